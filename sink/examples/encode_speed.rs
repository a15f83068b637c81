//! Nanoseconds per record of the JSON-to-Native path: `cargo run --release -p flumen-sink --example encode_speed`.

use std::hint::black_box;
use std::time::Instant;

use flumen_sink::block::{BlockBuilder, RowMeta};
use flumen_sink::column_type::ColumnType;
use flumen_sink::mapping::{MappingOptions, RowMapping};
use flumen_sink::table::{Column, TableSchema};

const RECORDS: usize = 100_000;
const ROUNDS: usize = 7;

fn main() {
    let columns = [
        ("event_id", "UUID"),
        ("store_id", "UInt32"),
        ("item_id", "UInt32"),
        ("kind", "LowCardinality(String)"),
        ("quantity", "Int32"),
        ("unit_price", "Decimal(12, 2)"),
        ("occurred_at", "DateTime64(3)"),
        ("cashier", "Nullable(String)"),
        ("member", "Bool"),
        ("note", "String"),
        ("_partition", "Int32"),
        ("_offset", "Int64"),
        ("_timestamp", "DateTime64(3)"),
        ("_key", "String"),
    ];
    let table = TableSchema {
        database: "default".into(),
        table: "inventory".into(),
        engine: "MergeTree".into(),
        columns: columns
            .iter()
            .filter_map(|(name, ty)| Some(Column::new(*name, ColumnType::parse(ty).ok()?)))
            .collect(),
    };
    let mapping = match RowMapping::new(&table, &MappingOptions::default()) {
        Ok(mapping) => mapping,
        Err(e) => return eprintln!("{e}"),
    };
    let records: Vec<Vec<u8>> = (0..RECORDS)
        .map(|n| {
            format!(
                "{{\"event_id\":\"{:08x}-0000-4000-8000-{:012x}\",\"store_id\":{},\"item_id\":{},\
                 \"kind\":\"purchase\",\"quantity\":{},\"unit_price\":{}.{:02},\
                 \"occurred_at\":\"2026-01-02T03:04:05.{:03}Z\",\"cashier\":\"cashier-{}\",\"member\":{},\
                 \"note\":\"paid in cash, receipt printed, bag taken\"}}",
                n,
                n * 7,
                n % 2000,
                n % 50_000,
                n % 9 + 1,
                n % 300,
                n % 100,
                n % 1000,
                n % 40,
                n % 2 == 0
            )
            .into_bytes()
        })
        .collect();
    let bytes: usize = records.iter().map(Vec::len).sum();
    let mut builder = BlockBuilder::new(&mapping);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for (offset, record) in (0i64..).zip(&records) {
            let meta = RowMeta {
                topic: "inventory",
                partition: 0,
                offset,
                timestamp_ms: 1_700_000_000_000 + offset,
                key: Some(b"store-17"),
            };
            if let Err(e) = builder.push_json(&meta, Some(record)) {
                return eprintln!("{e}");
            }
        }
        let pushed = start.elapsed();
        let block = black_box(builder.finish());
        let total = start.elapsed();
        println!(
            "{} B/record in, {} B/row out: {:.0} ns/record, {:.0} with the block written, {:.0} MB/s",
            bytes / RECORDS,
            block.len() / RECORDS,
            pushed.as_nanos() as f64 / RECORDS as f64,
            total.as_nanos() as f64 / RECORDS as f64,
            bytes as f64 / 1e6 / total.as_secs_f64()
        );
    }
}
