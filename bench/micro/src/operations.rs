//! The operations: inputs that are always the same, and the work that is counted.
//!
//! Every input that `times` at its largest will need is made before the first operation, whatever `times` is, so that
//! making them cancels out. An operation includes dropping what it made.

use std::hint::black_box;

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::fetch::{FetchPartitionData, FetchTopicData, encode_fetch_response};
use flumen_protocol::header::parse_request_header;
use flumen_protocol::produce::{TopicRef, decode_produce};
use flumen_protocol::record::BatchBuilder;
use flumen_protocol::record_batch;
use flumen_sink::block::{BlockBuilder, RowMeta};
use flumen_sink::column_type::ColumnType;
use flumen_sink::mapping::{MappingOptions, RowMapping};
use flumen_sink::table::{Column, TableSchema};
use flumen_storage::wal_format::{
    self, BATCH, BLOCK_HEADER_BYTES, BlockHeader, Bloom, RECORD_HEADER_BYTES, RecordHeader, block_bytes,
};
use flumen_storage::{DataDir, Entry, GroupConfig, IoKind, Payload, ShardStore, StoreConfig, Verdict};

pub struct Operation {
    pub name: &'static str,
    pub what: &'static str,
    pub times: usize,
    work: fn(prepared: usize, times: usize) -> Result<()>,
}

pub const OPERATIONS: &[Operation] = &[
    Operation {
        name: "produce-decode",
        what: "a Produce frame of one batch of 1 KiB",
        times: 1_000,
        work: |prepared, times| produce_decode(1, prepared, times),
    },
    Operation {
        name: "produce-decode-20",
        what: "a Produce frame of 20 batches of 1 KiB",
        times: 200,
        work: |prepared, times| produce_decode(20, prepared, times),
    },
    Operation {
        name: "header-check",
        what: "check of a produced batch of 1 KiB, with its checksum",
        times: 1_000,
        work: |_, times| header_check(1, 1024, times),
    },
    Operation {
        name: "header-check-128",
        what: "check of a produced batch of 128 records of 1 KiB",
        times: 200,
        work: |_, times| header_check(128, 1024, times),
    },
    Operation {
        name: "header-check-1280",
        what: "check of a produced batch of 1,280 records of 100 bytes",
        times: 200,
        work: |_, times| header_check(1280, 100, times),
    },
    Operation {
        name: "append",
        what: "check, sequence, offset, and staging of a batch of 1 KiB in the log",
        times: 800,
        work: append,
    },
    Operation { name: "wal-block", what: "a WAL block of 64 batches of 1 KiB", times: 200, work: wal_block },
    Operation {
        name: "fetch-encode",
        what: "a Fetch answer of 100 partitions with four slices each",
        times: 200,
        work: fetch_encode,
    },
    Operation {
        name: "native-row",
        what: "a JSON record of 200 bytes into columns",
        times: 2_000,
        work: native_row,
    },
    Operation {
        name: "native-block",
        what: "a Native block of 1,000 such rows, written out",
        times: 20,
        work: native_block,
    },
];

pub fn run(name: &str, times: usize) -> Result<()> {
    let Some(operation) = OPERATIONS.iter().find(|o| o.name == name) else {
        let known: Vec<&str> = OPERATIONS.iter().map(|o| o.name).collect();
        bail!("{name} is not one of {}", known.join(", "));
    };
    ensure!(times <= operation.times, "{name} is prepared for {} times", operation.times);
    (operation.work)(operation.times, times)
}

const PRODUCE_VERSION: i16 = 12;
const FETCH_VERSION: i16 = 16;
const TIMESTAMP_MS: i64 = 1_800_000_000_000;
const PRODUCER_ID: i64 = 7;

fn batch(sequence: i32) -> BytesMut {
    let value = [b'x'; 1024];
    let mut builder = BatchBuilder::new();
    builder.append(TIMESTAMP_MS, None, Some(&value), &[]);
    builder.producer(PRODUCER_ID, 0, sequence);
    builder.build(0)
}

fn produce_frame(partitions: u32) -> BytesMut {
    let batch = batch(0);
    let mut frame = BytesMut::new();
    frame.put_i16(0);
    frame.put_i16(PRODUCE_VERSION);
    frame.put_i32(1);
    frame.put_i16(6);
    frame.put_slice(b"client\0");
    // No transactional id; all acknowledgements, timeout, one topic.
    frame.put_u8(0);
    frame.put_i16(-1);
    frame.put_i32(30_000);
    frame.put_slice(&[2, 6]);
    frame.put_slice(b"topic");
    frame.put_u8(partitions as u8 + 1);
    for partition in 0..partitions {
        frame.put_u32(partition);
        let length = batch.len() as u32 + 1;
        frame.put_slice(&[(length & 0x7f) as u8 | 0x80, (length >> 7) as u8]);
        frame.put_slice(&batch);
        frame.put_u8(0);
    }
    frame.put_slice(&[0, 0]);
    frame
}

fn produce_decode(partitions: u32, prepared: usize, times: usize) -> Result<()> {
    let mut frames: Vec<BytesMut> = (0..prepared).map(|_| produce_frame(partitions)).collect();
    for _ in 0..times {
        let frame = frames.pop().context("prepared")?;
        let header = parse_request_header(&frame)?;
        let request = decode_produce(frame, header.body_offset, header.api_version)?;
        ensure!(request.partitions.len() == partitions as usize, "not all partitions were decoded");
        black_box(&request);
    }
    std::mem::forget(frames);
    Ok(())
}

fn header_check(records: usize, value_bytes: usize, times: usize) -> Result<()> {
    let value = vec![b'x'; value_bytes];
    let mut builder = BatchBuilder::new();
    for at in 0..records {
        builder.append(TIMESTAMP_MS + at as i64, None, Some(&value), &[]);
    }
    builder.producer(PRODUCER_ID, 0, 0);
    let batch = builder.build(0);
    for _ in 0..times {
        black_box(record_batch::validate_produced(black_box(&batch))?);
    }
    Ok(())
}

fn append(prepared: usize, times: usize) -> Result<()> {
    let mut batches: Vec<BytesMut> = (0..prepared as i32).rev().map(batch).collect();
    let place = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let dir = DataDir::open(place.path())?;
        let config = StoreConfig { io: IoKind::Sync, ..StoreConfig::default() };
        dir.recover(config.cache_bytes)?;
        let store = ShardStore::open(&dir, config).await?;
        let log = store.create(1, "topic-0.g1", GroupConfig::default())?;
        // Nothing below waits, so the store's own tasks and their disk do not run in between.
        for index in 1..=times as u64 {
            let mut records = batches.pop().context("prepared")?;
            let header = record_batch::validate_produced(&records)?;
            ensure!(matches!(log.producers().check(&header)?, Verdict::Append), "every batch is new");
            ensure!(log.has_room(records.len()), "the log is full");
            record_batch::set_base_offset(&mut records, log.log_end_offset());
            record_batch::set_leader_epoch(&mut records, 1);
            let entry = Entry { index, term: 1, payload: Payload::Batch(records.freeze()) };
            black_box(log.stage(None, std::slice::from_ref(&entry))?);
            log.set_high_watermark(log.log_end_offset());
        }
        ensure!(log.log_end_offset() == times as i64, "not all batches were appended");
        std::mem::forget((log, store, dir, batches));
        // Before the runtime gets a turn: the writer would start, and how far it comes is no one's to say.
        remove(place.path());
        std::process::exit(0)
    })
}

/// A directory that stays is only untidy.
fn remove(path: &std::path::Path) {
    let _ = std::fs::remove_dir_all(path);
}

fn wal_block(_: usize, times: usize) -> Result<()> {
    const BATCHES: usize = 64;
    let batch = batch(0);
    let record = RECORD_HEADER_BYTES + batch.len();
    let len = BLOCK_HEADER_BYTES + BATCHES * record;
    let mut buf = vec![0u8; block_bytes(len - BLOCK_HEADER_BYTES)];
    for sequence in 0..times as u64 {
        let mut groups = Bloom::default();
        for n in 0..BATCHES {
            let at = BLOCK_HEADER_BYTES + n * record;
            let group = n as u64 % 16;
            groups.insert(group);
            let header = RecordHeader { kind: BATCH, group, index: sequence, term: 1, offset: n as i64 };
            wal_format::write_record(&mut buf[at..at + record], &header, &batch);
        }
        let header = BlockHeader {
            lane: 0,
            shard: 0,
            payload_len: (len - BLOCK_HEADER_BYTES) as u32,
            wal_id: 1,
            boot_id: 1,
            sequence,
            lsn: sequence,
            file_seq: 0,
            oldest_live: 0,
            groups,
            previous_groups: Bloom::default(),
            payload_crc: crc32c::crc32c(&buf[BLOCK_HEADER_BYTES..len]),
            previous_payload_crc: 0,
        };
        header.encode(&mut buf);
        buf[len..].fill(0);
        black_box(&buf);
    }
    ensure!(times == 0 || BlockHeader::decode(&buf).is_some(), "the block cannot be read again");
    Ok(())
}

fn fetch_encode(_: usize, times: usize) -> Result<()> {
    let records = batch(0).freeze();
    let partitions = (0..100)
        .map(|partition| FetchPartitionData {
            high_watermark: 100,
            last_stable_offset: 100,
            log_start_offset: 0,
            records: vec![records.clone(); 4],
            ..FetchPartitionData::failed(partition, ErrorCode::NONE)
        })
        .collect();
    let topics = [FetchTopicData { topic: TopicRef::Name("topic".into()), partitions }];
    for _ in 0..times {
        let segments: Vec<Bytes> =
            encode_fetch_response(FETCH_VERSION, 1, 0, ErrorCode::NONE, 0, black_box(&topics));
        ensure!(segments.len() > 400, "records are missing");
        black_box(&segments);
    }
    std::mem::forget(topics);
    Ok(())
}

const ROW: &[u8] = br#"{"id":"8f14e45fceea167a","ts":"2027-01-15 08:00:00.123","user_id":184467440,"store":"store-042","sku":"SKU-0012345","quantity":3,"price":1999,"currency":"EUR","note":"left at the door, please"}"#;

fn builder() -> Result<BlockBuilder> {
    let columns = [
        ("_partition", "Int32"),
        ("_offset", "Int64"),
        ("id", "String"),
        ("ts", "DateTime64(3)"),
        ("user_id", "UInt64"),
        ("store", "LowCardinality(String)"),
        ("sku", "String"),
        ("quantity", "UInt32"),
        ("price", "Int64"),
        ("currency", "LowCardinality(String)"),
        ("note", "Nullable(String)"),
    ];
    let columns = columns
        .iter()
        .map(|(name, ty)| Ok(Column::new(*name, ColumnType::parse(ty)?)))
        .collect::<Result<Vec<_>>>()?;
    let table = TableSchema { database: "d".into(), table: "t".into(), engine: "MergeTree".into(), columns };
    Ok(BlockBuilder::new(&RowMapping::new(&table, &MappingOptions::default())?))
}

fn push(block: &mut BlockBuilder, rows: usize) -> Result<()> {
    for offset in 0..rows as i64 {
        let meta = RowMeta { topic: "t", partition: 0, offset, timestamp_ms: TIMESTAMP_MS, key: None };
        if let Err(e) = block.push_json(&meta, Some(black_box(ROW))) {
            bail!("the row was refused: {e:?}");
        }
    }
    Ok(())
}

fn native_row(prepared: usize, times: usize) -> Result<()> {
    let mut block = builder()?;
    // Columns keep their memory over blocks, as in a broker that runs for a while.
    push(&mut block, prepared)?;
    block.clear();
    push(&mut block, times)?;
    ensure!(block.rows() == times, "rows are missing");
    Ok(())
}

fn native_block(prepared: usize, times: usize) -> Result<()> {
    let mut blocks = Vec::new();
    for _ in 0..prepared {
        let mut block = builder()?;
        push(&mut block, 1_000)?;
        blocks.push(block);
    }
    for block in blocks.iter_mut().take(times) {
        let bytes = block.finish();
        ensure!(bytes.len() > 1_000 * 50, "the block is too small");
        black_box(&bytes);
    }
    std::mem::forget(blocks);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_does_its_work() {
        for operation in OPERATIONS.iter().filter(|o| o.name != "append") {
            run(operation.name, 2).unwrap_or_else(|e| panic!("{}: {e:#}", operation.name));
        }
        assert!(run("nothing", 1).is_err());
    }
}
