//! Properties over arbitrary values: what is written reads back, whatever the pieces it arrives in.

use bytes::BytesMut;
use flumen_protocol::compression::Compression;
use flumen_protocol::frame::FrameAssembler;
use flumen_protocol::record::{BatchBuilder, decode_records};
use flumen_protocol::record_batch;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

type Header = (String, Option<Vec<u8>>);
type Entry = (i64, Option<Vec<u8>>, Option<Vec<u8>>, Vec<Header>);

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let content = || option::of(vec(any::<u8>(), 0..200));
    let headers = vec(("[a-zé]{0,8}", content()), 0..4);
    // Deltas between any two must fit, as they do for real clocks.
    vec((-(1i64 << 60)..1 << 60, content(), content(), headers), 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn records_read_back_as_written(entries in entries(), codec in 0i16..5, base_offset in 0..i64::MAX / 2) {
        let mut builder = BatchBuilder::new();
        builder.compression(Compression::from_id(codec).expect("known codec"));
        for (timestamp, key, value, headers) in &entries {
            let headers: Vec<_> = headers.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
            builder.append(*timestamp, key.as_deref(), value.as_deref(), &headers);
        }
        let uncompressed_bytes = builder.size_bytes();
        let batch = builder.build(base_offset);
        let header = record_batch::validate_produced(&batch).expect("valid");
        prop_assert_eq!(header.record_count as usize, entries.len());
        let latest = entries.iter().map(|entry| entry.0).max();
        prop_assert_eq!(Some(header.max_timestamp), latest);
        let mut scratch = Vec::new();
        let mut records = decode_records(&batch, &mut scratch, uncompressed_bytes).expect("opens");
        for (n, (timestamp, key, value, headers)) in entries.iter().enumerate() {
            let record = records.next().expect("as many").expect("decodes");
            prop_assert_eq!(record.offset, base_offset + n as i64);
            prop_assert_eq!(record.timestamp, *timestamp);
            prop_assert_eq!((record.key, record.value), (key.as_deref(), value.as_deref()));
            let expected: Vec<_> = headers.iter().map(|(key, value)| (key.as_bytes(), value.as_deref())).collect();
            prop_assert_eq!(record.headers.collect::<Vec<_>>(), expected);
        }
        prop_assert!(records.next().is_none());
    }

    #[test]
    fn frames_do_not_depend_on_the_pieces(
        payloads in vec(vec(any::<u8>(), 4..9000), 0..6),
        cuts in vec(1usize..5000, 1..40),
        direct in any::<bool>(),
    ) {
        let mut stream = Vec::new();
        for payload in &payloads {
            stream.extend_from_slice(&(payload.len() as i32).to_be_bytes());
            stream.extend_from_slice(payload);
        }
        let mut assembler = FrameAssembler::new(1 << 20);
        let mut frames: Vec<BytesMut> = Vec::new();
        let mut rest = stream.as_slice();
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let mut piece = (*cuts.next().expect("endless")).min(rest.len());
            match assembler.partial_mut() {
                Some((partial, missing)) if direct => {
                    let room = partial.capacity() - partial.len();
                    prop_assert!(room >= 1 && room <= missing);
                    piece = piece.min(room);
                    partial.extend_from_slice(&rest[..piece]);
                    frames.extend(assembler.take_complete());
                }
                _ => assembler.push(&rest[..piece], &mut frames).expect("well formed"),
            }
            rest = &rest[piece..];
        }
        prop_assert_eq!(frames, payloads);
        prop_assert!(assembler.is_idle());
    }
}
