use std::collections::BTreeMap;

use proptest::prelude::*;

use super::codec::{decode, encode};
use super::*;

fn mapping() -> MappingRecord {
    let table = TableSchema {
        database: "db".into(),
        table: "t".into(),
        engine: "MergeTree".into(),
        columns: vec![
            Column::new("id", ColumnType::Int64),
            Column { name: "at".into(), ty: ColumnType::Date, default_kind: DefaultKind::Default },
        ],
    };
    let options = MappingOptions { server_default_columns: vec!["at".into()], ..MappingOptions::default() };
    MappingRecord::new(&table, &options, false).unwrap().0
}

fn plan(state: &ExportState, ranges: &[(i32, i64, i64)], dead_letters: u32) -> Plan {
    let ranges: Vec<Range> = ranges
        .iter()
        .map(|(partition, first, last)| Range {
            partition: *partition,
            first: *first,
            last: *last,
            rows: (last - first + 1) as u64,
        })
        .collect();
    Plan {
        topic_id: state.topic_id,
        sink_epoch: state.sink_epoch,
        seq: state.next_seq,
        rows: ranges.iter().map(|r| r.rows).sum(),
        ranges,
        dead_letters,
        skipped: 1,
        dlq_first_sequence: state.dlq_next_sequence,
        mapping_version: state.mapping_version.unwrap_or(0),
        encoder_version: 1,
        block_crc: 0xfeed,
        block_bytes: 77,
        origin: Origin::Log,
        rejected: Vec::new(),
        server_started_s: 5,
        look_first: false,
    }
}

fn opened(positions: &[(i32, i64)]) -> ExportState {
    let mut state = ExportState::default();
    let start: BTreeMap<i32, i64> = positions.iter().copied().collect();
    let opened = state.reopen([3; 16], &start, &BTreeMap::new());
    state.apply(&opened).unwrap();
    state.apply(&Record::Mapped(mapping())).unwrap();
    state
}

#[test]
fn settled_is_the_first_offset_of_the_oldest_open_plan() {
    let mut state = opened(&[(0, 10), (1, 0)]);
    let first = plan(&state, &[(0, 10, 19)], 2);
    state.apply(&Record::Planned(first)).unwrap();
    let second = plan(&state, &[(0, 20, 29), (1, 0, 4)], 1);
    assert_eq!(second.dlq_first_sequence, 2);
    state.apply(&Record::Planned(second)).unwrap();
    assert_eq!((state.settled(0), state.settled(1), state.settled(2)), (Some(10), Some(0), None));
    // Out of order: the offset waits for the first plan.
    state.apply(&Record::Settled { seq: 1 }).unwrap();
    assert_eq!(state.settled_offsets(), BTreeMap::from([(0, 10), (1, 5)]));
    state.apply(&Record::Settled { seq: 0 }).unwrap();
    assert_eq!(state.settled_offsets(), BTreeMap::from([(0, 30), (1, 5)]));
    assert_eq!((state.rows, state.dead_letters, state.skipped), (25, 3, 2));
}

#[test]
fn records_that_do_not_follow_are_refused() {
    let mut state = opened(&[(0, 0)]);
    let gap = plan(&state, &[(0, 1, 2)], 0);
    assert!(matches!(state.apply(&Record::Planned(gap)), Err(StateError::Gap { expected: 0, .. })));
    let unknown = plan(&state, &[(9, 0, 2)], 0);
    assert!(matches!(state.apply(&Record::Planned(unknown)), Err(StateError::Gap { expected: -1, .. })));
    let mut late = plan(&state, &[(0, 0, 2)], 0);
    late.seq = 4;
    assert!(matches!(state.apply(&Record::Planned(late)), Err(StateError::Sequence { .. })));
    let mut epoch = plan(&state, &[(0, 0, 2)], 0);
    epoch.sink_epoch = 9;
    assert!(matches!(state.apply(&Record::Planned(epoch)), Err(StateError::Epoch { .. })));
    let mut other = plan(&state, &[(0, 0, 2)], 0);
    other.mapping_version ^= 1;
    assert!(matches!(state.apply(&Record::Planned(other)), Err(StateError::Mapping { .. })));
    let twice = plan(&state, &[(0, 0, 2), (0, 3, 4)], 0);
    assert!(matches!(state.apply(&Record::Planned(twice)), Err(StateError::Malformed { .. })));
    assert!(matches!(state.apply(&Record::Settled { seq: 0 }), Err(StateError::NotOpen { .. })));
}

#[test]
fn a_split_covers_its_parent_and_keeps_the_offset() {
    let mut state = opened(&[(0, 0), (1, 0)]);
    let parent = plan(&state, &[(0, 0, 9), (1, 0, 9)], 1);
    state.apply(&Record::Planned(parent)).unwrap();
    let child = |seq: u64, ranges: &[(i32, i64, i64)]| {
        let mut child = plan(&state, ranges, 0);
        child.seq = seq;
        child.origin = Origin::Split { parent: 0 };
        child
    };
    let holes = vec![child(1, &[(0, 0, 9)]), child(2, &[(1, 1, 9)])];
    assert!(matches!(
        state.clone().apply(&Record::Split { seq: 0, into: holes }),
        Err(StateError::Malformed { .. })
    ));
    let mut into = vec![child(1, &[(0, 0, 9), (1, 0, 3)]), child(2, &[(1, 4, 9)])];
    into.iter_mut().for_each(|child| child.skipped = 0);
    state.apply(&Record::Split { seq: 0, into }).unwrap();
    assert_eq!(state.open.keys().copied().collect::<Vec<_>>(), [1, 2]);
    state.apply(&Record::Settled { seq: 1 }).unwrap();
    assert_eq!(state.settled_offsets(), BTreeMap::from([(0, 10), (1, 4)]));
    state.apply(&Record::Settled { seq: 2 }).unwrap();
    assert_eq!(state.settled_offsets(), BTreeMap::from([(0, 10), (1, 10)]));
    assert_eq!((state.next_seq, state.dead_letters, state.skipped), (3, 1, 1));
}

#[test]
fn replay_bumps_the_epoch_and_remembers_what_may_be_there() {
    let mut state = opened(&[(0, 0), (1, 0)]);
    let open = plan(&state, &[(0, 0, 99)], 0);
    state.apply(&Record::Planned(open)).unwrap();
    let again = state.reopen(state.topic_id, &BTreeMap::from([(0, 50), (1, 0)]), &BTreeMap::new());
    state.apply(&again).unwrap();
    assert_eq!((state.sink_epoch, state.open.len()), (2, 0));
    assert_eq!(state.settled_offsets(), BTreeMap::from([(0, 50), (1, 0)]));
    let range = |first| Range { partition: 0, first, last: first + 9, rows: 10 };
    assert!(state.must_look_first(&[range(50)]) && state.must_look_first(&[range(99)]));
    assert!(!state.must_look_first(&[range(100)]));
}

#[test]
fn mappings_live_as_long_as_plans_need_them() {
    let mut state = opened(&[(0, 0)]);
    let old = state.mapping_version.unwrap();
    let open = plan(&state, &[(0, 0, 9)], 0);
    state.apply(&Record::Planned(open)).unwrap();
    let mut newer = mapping();
    newer.version ^= 1;
    state.apply(&Record::Mapped(newer)).unwrap();
    assert_eq!(state.mappings.len(), 2);
    state.apply(&Record::Settled { seq: 0 }).unwrap();
    assert!(state.mappings.len() == 1 && !state.mappings.contains_key(&old));
    assert_eq!(mapping().row_mapping().unwrap().columns().len(), 1);
}

#[test]
fn what_is_next() {
    let mut state = opened(&[(0, 0)]);
    assert_eq!(next_step(&state, Event::Recovered), [Action::Collect]);
    assert_eq!(next_step(&state, Event::Prepared { records: 5 }), [Action::Plan]);
    assert_eq!(next_step(&state, Event::Prepared { records: 0 }), [Action::Collect]);
    let open = plan(&state, &[(0, 0, 9)], 0);
    state.apply(&Record::Planned(open)).unwrap();
    assert_eq!(next_step(&state, Event::Recovered), [Action::Settle { seq: 0 }, Action::Collect]);
    state.records_since_snapshot = SNAPSHOT_EVERY;
    assert!(next_step(&state, Event::Settled).contains(&Action::Snapshot));
}

#[test]
fn sequences_wrap_as_kafkas_do() {
    assert_eq!(add_sequence(i32::MAX, 1), 0);
    assert_eq!(add_sequence(i32::MAX - 1, 3), 1);
    assert_eq!(add_sequence(5, 0), 5);
}

#[test]
fn tokens_name_the_plan() {
    let state = opened(&[(2, 7)]);
    let plan = plan(&state, &[(2, 7, 9)], 0);
    assert_eq!(plan.token("c"), "c/03030303-0303-0303-0303-030303030303/1/0:2:7-9");
    assert!(plan.repair_token("c", 3).ends_with(":2:7-9~r3"));
}

/// A random but consistent history of records.
fn history(choices: &[u8]) -> (Vec<Record>, ExportState) {
    let mut state = ExportState::default();
    let mut records = Vec::new();
    let start = BTreeMap::from([(0, 0), (1, 100), (7, 3)]);
    let mut push = |state: &mut ExportState, record: Record| {
        state.apply(&record).unwrap();
        records.push(record);
    };
    let first = state.reopen([1; 16], &start, &BTreeMap::from([(1, 150)]));
    push(&mut state, first);
    push(&mut state, Record::Mapped(mapping()));
    push(&mut state, Record::Producer { id: 12 });
    for choice in choices {
        let oldest = state.open.keys().next().copied();
        match (choice % 7, oldest) {
            (0 | 1, _) if state.open.len() < MAX_OPEN_PLANS => {
                let ranges: Vec<(i32, i64, i64)> = state
                    .planned
                    .iter()
                    .filter(|(p, _)| (i32::from(*choice) >> (**p % 8)) & 1 == 0)
                    .map(|(p, o)| (*p, *o, o + i64::from(*choice)))
                    .collect();
                if !ranges.is_empty() {
                    let plan = plan(&state, &ranges, u32::from(*choice) % 3);
                    push(&mut state, Record::Planned(plan));
                }
            }
            (2, Some(seq)) => push(&mut state, Record::DeadLettersWritten { seq }),
            (3, Some(seq)) => push(&mut state, Record::Repairing { seq, n: 1, block_crc: 9 }),
            (4, Some(seq)) => {
                let parent = state.open[&seq].plan.clone();
                let child = Plan {
                    seq: state.next_seq,
                    origin: Origin::Split { parent: seq },
                    dead_letters: 1,
                    dlq_first_sequence: state.dlq_next_sequence,
                    rejected: vec![Rejected { partition: 0, offset: 1, ch_code: 469 }],
                    ..parent
                };
                push(&mut state, Record::Split { seq, into: vec![child] });
            }
            (5, _) => push(&mut state, Record::Started { partition: i32::from(*choice), offset: 0 }),
            (_, Some(seq)) => push(&mut state, Record::Settled { seq }),
            _ => {}
        }
    }
    (records, state)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn replay_gives_the_state_back(
        choices in proptest::collection::vec(any::<u8>(), 0..60),
        at in any::<prop::sample::Index>(),
    ) {
        let (records, state) = history(&choices);
        let bytes: Vec<_> = records.iter().map(encode).collect();
        for (record, bytes) in records.iter().zip(&bytes) {
            prop_assert_eq!(&decode(bytes).unwrap(), record);
        }
        let replayed = ExportState::replay(bytes.iter().map(|b| &b[..])).unwrap();
        prop_assert_eq!(&replayed, &state);

        // A snapshot at any point, followed by the rest, gives the same.
        let at = at.index(records.len() + 1);
        let mut half = ExportState::default();
        for record in &records[..at] {
            half.apply(record).unwrap();
        }
        let snapshot = encode(&half.snapshot());
        let rest = bytes[at..].iter().map(|b| &b[..]);
        let mut resumed = ExportState::replay(std::iter::once(&snapshot[..]).chain(rest)).unwrap();
        resumed.records_since_snapshot = state.records_since_snapshot;
        prop_assert_eq!(resumed, state);
    }

    #[test]
    fn damaged_records_never_panic(
        choices in proptest::collection::vec(any::<u8>(), 1..30),
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let (mut all, state) = history(&choices);
        all.push(state.snapshot());
        let mut bytes = encode(&all[which.index(all.len())]).to_vec();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
            prop_assert!(decode(&bytes).is_err());
        } else {
            bytes[at] = byte;
            if let Ok(record) = decode(&bytes) {
                let _ = ExportState::default().apply(&record);
                let _ = state.clone().apply(&record);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
    }
}
