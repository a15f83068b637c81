//! An honest history passes; each anomaly, planted in at least three ways, is found by its check.

use flumen_checker::{Event, History, Options, Outcome, check};

const A: &str = "a-0";
const B: &str = "b-0";

fn send(op: u64, producer: u64, partition: &str, value: u64, txn: Option<u64>) -> Event {
    Event::Send { op, producer, epoch: 0, partition: partition.to_owned(), value, txn }
}

fn sent(op: u64, offset: i64) -> Event {
    Event::Sent { op, outcome: Outcome::Ok, offset: Some(offset) }
}

fn poll(partition: &str, records: &[(i64, u64)], committed_only: bool, txn: Option<u64>) -> Event {
    let (consumer, seek) = (if txn.is_some() { 20 } else { 10 }, false);
    Event::Poll {
        consumer,
        partition: partition.to_owned(),
        records: records.to_vec(),
        committed_only,
        seek,
        txn,
    }
}

/// A transaction reads one record of `B`, whether it is committed or not.
fn read_within(consumer: u64, value: u64, at: i64, txn: u64) -> Event {
    Event::Poll {
        consumer,
        partition: B.to_owned(),
        records: vec![(at, value)],
        committed_only: false,
        seek: false,
        txn: Some(txn),
    }
}

fn marks(epoch: i32, high_watermark: i64, last_stable: i64) -> Event {
    Event::Watermarks {
        observer: 5,
        partition: A.to_owned(),
        leader_epoch: epoch,
        high_watermark,
        last_stable,
    }
}

fn digest(node: u64, up_to: i64, digest: u64) -> Event {
    Event::Digest { node, partition: A.to_owned(), up_to, digest }
}

fn assigned(generation: i64, member: &str, partitions: &[&str]) -> Event {
    Event::Assigned {
        group: "g".to_owned(),
        generation,
        member: member.to_owned(),
        partitions: partitions.iter().map(|p| (*p).to_owned()).collect(),
    }
}

fn row(offset: i64, value: u64) -> Event {
    Event::ExportRow { partition: A.to_owned(), offset, value }
}

fn final_read(partition: &str, records: &[(i64, u64)], committed: &[u64]) -> Event {
    Event::FinalRead {
        partition: partition.to_owned(),
        log_start: 0,
        records: records.to_vec(),
        committed: committed.to_vec(),
    }
}

/// Values are 100 + op. Partition A: 101, 102, 103 (unknown, but there), 105 (transaction 1), 109; B: 106 (transaction 1),
/// 107 (transaction 2, aborted), 108 (transaction 3).
fn honest() -> Vec<Event> {
    vec![
        send(1, 1, A, 101, None),
        sent(1, 0),
        send(2, 1, A, 102, None),
        sent(2, 1),
        send(3, 1, A, 103, None),
        Event::Sent { op: 3, outcome: Outcome::Unknown, offset: None },
        send(4, 1, A, 104, None),
        Event::Sent { op: 4, outcome: Outcome::Failed, offset: None },
        Event::AskEnd { op: 50, partition: A.to_owned() },
        Event::End { op: 50, offset: 2 },
        marks(1, 2, 2),
        send(5, 2, A, 105, Some(1)),
        sent(5, 3),
        send(6, 2, B, 106, Some(1)),
        sent(6, 0),
        marks(1, 4, 3),
        poll(A, &[(0, 101), (1, 102)], true, None),
        Event::TxnEnd { txn: 1, commit: true },
        Event::TxnEnded { txn: 1, outcome: Outcome::Ok },
        send(7, 2, B, 107, Some(2)),
        sent(7, 2),
        Event::TxnEnd { txn: 2, commit: false },
        Event::TxnEnded { txn: 2, outcome: Outcome::Ok },
        poll(A, &[(2, 103), (3, 105)], true, None),
        poll(B, &[(0, 106)], true, Some(3)),
        send(8, 3, B, 108, Some(3)),
        sent(8, 4),
        Event::TxnEnd { txn: 3, commit: true },
        Event::TxnEnded { txn: 3, outcome: Outcome::Ok },
        marks(2, 5, 5),
        marks(1, 4, 4),
        Event::Fence { producer: 1, epoch: 1 },
        assigned(1, "m1", &[A, B]),
        assigned(2, "m1", &[A]),
        assigned(2, "m2", &[B]),
        Event::Healed { bound_ms: 1000 },
        Event::Send { op: 9, producer: 1, epoch: 1, partition: A.to_owned(), value: 109, txn: None },
        sent(9, 5),
        send(10, 4, B, 110, None),
        sent(10, 6),
        digest(1, 6, 77),
        digest(2, 6, 77),
        digest(3, 5, 66),
        row(0, 101),
        row(1, 102),
        row(2, 103),
        row(3, 105),
        Event::Exported { partition: A.to_owned(), up_to: 5 },
        final_read(A, &[(0, 101), (1, 102), (2, 103), (3, 105), (5, 109)], &[101, 102, 103, 105, 109]),
        final_read(B, &[(0, 106), (2, 107), (4, 108), (6, 110)], &[106, 108, 110]),
        Event::Over,
    ]
}

fn history(events: Vec<Event>) -> History {
    let mut history = History::default();
    for (at, event) in events.into_iter().enumerate() {
        history.push(at as u64 * 10, event);
    }
    history
}

fn found(events: Vec<Event>) -> Vec<&'static str> {
    let options = Options { isolated_writes: true };
    let mut names: Vec<_> = check(&history(events), options).into_iter().map(|a| a.check).collect();
    names.dedup();
    names
}

type Plant = fn(&mut Vec<Event>);

fn place(events: &[Event], event: &Event) -> usize {
    events.iter().position(|e| e == event).unwrap_or_else(|| panic!("{event:?}"))
}

fn replace(events: &mut [Event], old: &Event, new: Event) {
    let at = place(events, old);
    events[at] = new;
}

fn insert_before(events: &mut Vec<Event>, before: &Event, new: Event) {
    let at = place(events, before);
    events.insert(at, new);
}

fn insert_after(events: &mut Vec<Event>, after: &Event, new: Event) {
    let at = place(events, after);
    events.insert(at + 1, new);
}

fn with_final(events: &mut [Event], partition: &str, change: impl Fn(&mut Vec<(i64, u64)>, &mut Vec<u64>)) {
    for event in events {
        if let Event::FinalRead { partition: name, records, committed, .. } = event
            && name == partition
        {
            change(records, committed);
        }
    }
}

fn swap_txn_writes(e: &mut Vec<Event>, more: &[(u64, &str, u64, u64, i64)]) {
    for (op, partition, value, txn, offset) in more.iter().copied() {
        insert_before(e, &Event::Over, send(op, op, partition, value, Some(txn)));
        insert_before(e, &Event::Over, sent(op, offset));
        with_final(e, partition, |r, c| {
            r.push((offset, value));
            c.push(value);
        });
    }
}

const PLANTED: &[(&str, &[Plant])] = &[
    (
        "lost-write",
        &[
            |e| {
                with_final(e, A, |r, c| {
                    r.remove(1);
                    c.remove(1);
                })
            },
            |e| {
                with_final(e, A, |r, _| {
                    r.pop();
                })
            },
            |e| {
                with_final(e, B, |_, c| {
                    c.retain(|v| *v != 110);
                })
            },
        ],
    ),
    (
        "duplicate",
        &[
            |e| {
                with_final(e, A, |r, c| {
                    r.push((6, 102));
                    c.push(102);
                })
            },
            |e| {
                insert_after(e, &poll(A, &[(2, 103), (3, 105)], true, None), poll(A, &[(4, 101)], true, None))
            },
            |e| with_final(e, B, |_, c| c.push(110)),
        ],
    ),
    (
        "inconsistent-offset",
        &[
            |e| {
                replace(
                    e,
                    &poll(A, &[(0, 101), (1, 102)], true, None),
                    poll(A, &[(0, 101), (1, 103)], true, None),
                )
            },
            |e| replace(e, &sent(2, 1), sent(2, 0)),
            |e| with_final(e, B, |r, _| r[0] = (0, 108)),
        ],
    ),
    (
        "nonmonotonic-send",
        &[
            |e| {
                replace(e, &sent(1, 0), sent(1, 1));
                replace(e, &sent(2, 1), sent(2, 0));
            },
            |e| replace(e, &sent(9, 5), sent(9, 1)),
            |e| replace(e, &sent(7, 2), sent(7, 0)),
        ],
    ),
    (
        "reordered",
        &[
            |e| {
                with_final(e, A, |r, _| {
                    r[0].1 = 102;
                    r[1].1 = 101;
                })
            },
            |e| {
                with_final(e, A, |r, _| {
                    r[1].1 = 103;
                    r[2].1 = 102;
                })
            },
            |e| {
                with_final(e, B, |r, _| {
                    r[0].1 = 107;
                    r[1].1 = 106;
                })
            },
        ],
    ),
    (
        "nonmonotonic-poll",
        &[
            |e| {
                insert_after(e, &poll(A, &[(2, 103), (3, 105)], true, None), poll(A, &[(1, 102)], true, None))
            },
            |e| {
                replace(
                    e,
                    &poll(A, &[(2, 103), (3, 105)], true, None),
                    poll(A, &[(3, 105), (2, 103)], true, None),
                )
            },
            |e| insert_after(e, &poll(B, &[(0, 106)], true, Some(3)), poll(B, &[(0, 106)], true, Some(3))),
        ],
    ),
    (
        "poll-skip",
        &[
            |e| replace(e, &poll(A, &[(2, 103), (3, 105)], true, None), poll(A, &[(3, 105)], true, None)),
            |e| replace(e, &poll(A, &[(0, 101), (1, 102)], true, None), poll(A, &[(0, 101)], true, None)),
            |e| insert_before(e, &Event::Over, poll(B, &[(6, 110)], false, Some(3))),
        ],
    ),
    (
        "phantom",
        &[
            |e| with_final(e, A, |r, _| r.push((6, 999))),
            |e| with_final(e, A, |r, _| r.push((6, 110))),
            |e| insert_before(e, &Event::Over, poll(A, &[(4, 555)], false, None)),
        ],
    ),
    (
        "replicas-differ",
        &[
            |e| replace(e, &digest(2, 6, 77), digest(2, 6, 78)),
            |e| insert_before(e, &Event::Over, digest(1, 5, 67)),
            |e| replace(e, &digest(3, 5, 66), digest(3, 6, 66)),
        ],
    ),
    (
        "export-differs",
        &[
            |e| {
                let at = place(e, &row(1, 102));
                e.remove(at);
            },
            |e| insert_after(e, &row(1, 102), row(1, 102)),
            |e| replace(e, &row(3, 105), row(3, 106)),
            |e| insert_after(e, &row(3, 105), row(4, 104)),
        ],
    ),
    (
        "fencing",
        &[
            |e| insert_before(e, &send(2, 1, A, 102, None), Event::Fence { producer: 1, epoch: 1 }),
            |e| {
                let last = send(9, 1, A, 109, None);
                let old = Event::Send {
                    op: 9,
                    producer: 1,
                    epoch: 1,
                    partition: A.to_owned(),
                    value: 109,
                    txn: None,
                };
                replace(e, &old, last);
            },
            |e| {
                let old = send(1, 1, A, 101, None);
                replace(
                    e,
                    &old,
                    Event::Send {
                        op: 1,
                        producer: 1,
                        epoch: 3,
                        partition: A.to_owned(),
                        value: 101,
                        txn: None,
                    },
                );
            },
        ],
    ),
    (
        "group-ownership",
        &[
            |e| replace(e, &assigned(2, "m2", &[B]), assigned(2, "m2", &[A, B])),
            |e| insert_after(e, &assigned(1, "m1", &[A, B]), assigned(1, "m3", &[B])),
            |e| insert_after(e, &assigned(2, "m1", &[A]), assigned(1, "m1", &[])),
        ],
    ),
    (
        "watermark-back",
        &[
            |e| replace(e, &marks(2, 5, 5), marks(2, 3, 3)),
            |e| replace(e, &marks(1, 4, 3), marks(1, 4, 1)),
            |e| replace(e, &marks(1, 2, 2), marks(1, 2, 3)),
        ],
    ),
    (
        "stale-read",
        &[
            |e| replace(e, &Event::End { op: 50, offset: 2 }, Event::End { op: 50, offset: 1 }),
            |e| {
                insert_after(e, &sent(9, 5), Event::AskEnd { op: 51, partition: A.to_owned() });
                insert_before(e, &Event::Over, Event::End { op: 51, offset: 5 });
            },
            |e| {
                insert_before(e, &Event::Over, Event::AskEnd { op: 52, partition: B.to_owned() });
                insert_before(e, &Event::Over, Event::End { op: 52, offset: 0 });
            },
        ],
    ),
    (
        "liveness",
        &[
            |e| replace(e, &sent(9, 5), Event::Sent { op: 9, outcome: Outcome::Unknown, offset: None }),
            |e| replace(e, &Event::Healed { bound_ms: 1000 }, Event::Healed { bound_ms: 25 }),
            |e| e.retain(|e| !matches!(e, Event::FinalRead { partition, .. } if partition == B)),
            |e| insert_before(e, &Event::Over, send(11, 1, A, 111, None)),
        ],
    ),
    (
        "aborted-read",
        &[
            |e| insert_before(e, &Event::Over, poll(B, &[(2, 107)], true, None)),
            |e| with_final(e, B, |_, c| c.push(107)),
            |e| insert_before(e, &Event::Over, poll(A, &[(4, 104)], false, None)),
            |e| {
                replace(
                    e,
                    &Event::TxnEnded { txn: 1, outcome: Outcome::Ok },
                    Event::TxnEnded { txn: 1, outcome: Outcome::Failed },
                )
            },
        ],
    ),
    (
        "precommitted-read",
        &[
            |e| {
                insert_before(
                    e,
                    &Event::TxnEnd { txn: 1, commit: true },
                    poll(A, &[(2, 103), (3, 105)], true, None),
                )
            },
            |e| insert_after(e, &sent(8, 4), poll(B, &[(4, 108)], true, None)),
            |e| e.retain(|e| !matches!(e, Event::TxnEnd { txn: 3, .. })),
        ],
    ),
    (
        "torn-transaction",
        &[
            |e| with_final(e, A, |_, c| c.retain(|v| *v != 105)),
            |e| with_final(e, B, |_, c| c.retain(|v| *v != 106)),
            |e| swap_txn_writes_half(e),
        ],
    ),
    (
        "read-cycle",
        &[
            |e| {
                insert_before(
                    e,
                    &Event::TxnEnd { txn: 1, commit: true },
                    poll(B, &[(4, 108)], false, Some(1)),
                )
            },
            |e| {
                insert_before(e, &Event::TxnEnd { txn: 2, commit: false }, read_within(30, 108, 4, 2));
                insert_before(e, &Event::TxnEnd { txn: 2, commit: false }, read_within(31, 107, 2, 3));
            },
            |e| {
                insert_before(e, &Event::Over, read_within(31, 108, 4, 7));
                swap_txn_writes(e, &[(20, B, 120, 7, 8)]);
                insert_before(e, &Event::Over, read_within(32, 120, 8, 1));
            },
        ],
    ),
    (
        "write-cycle",
        &[
            |e| {
                swap_txn_writes(
                    e,
                    &[(20, A, 120, 5, 6), (21, A, 121, 6, 7), (22, B, 122, 6, 8), (23, B, 123, 5, 9)],
                )
            },
            |e| swap_txn_writes(e, &[(20, A, 120, 5, 6), (21, A, 121, 6, 7), (22, A, 122, 5, 8)]),
            |e| {
                swap_txn_writes(
                    e,
                    &[
                        (20, A, 120, 5, 6),
                        (21, A, 121, 6, 7),
                        (22, A, 122, 7, 8),
                        (23, B, 123, 7, 8),
                        (24, B, 124, 5, 9),
                    ],
                )
            },
        ],
    ),
];

fn swap_txn_writes_half(e: &mut Vec<Event>) {
    swap_txn_writes(e, &[(20, A, 120, 5, 6), (21, B, 121, 5, 8)]);
    insert_before(e, &Event::Over, Event::TxnEnd { txn: 5, commit: true });
    insert_before(e, &Event::Over, Event::TxnEnded { txn: 5, outcome: Outcome::Unknown });
    with_final(e, B, |_, c| c.retain(|v| *v != 121));
}

#[test]
fn an_honest_history_passes() {
    let events = honest();
    assert_eq!(check(&history(events), Options { isolated_writes: true }), []);
}

#[test]
fn every_planted_anomaly_is_found_by_its_check() {
    for (name, plants) in PLANTED {
        assert!(plants.len() >= 3, "{name}");
        for (at, plant) in plants.iter().enumerate() {
            let mut events = honest();
            plant(&mut events);
            let names = found(events);
            // One anomaly often looks like several; the check that is meant must be among those that speak.
            assert!(names.contains(name), "{name} {at}: found {names:?}");
        }
    }
}

#[test]
fn every_check_has_something_planted() {
    for name in flumen_checker::check_names() {
        assert!(PLANTED.iter().any(|(planted, _)| *planted == name), "{name}");
    }
}

#[test]
fn a_history_is_kept_and_read_again() {
    let kept = history(honest());
    let text = kept.to_text();
    assert_eq!(text.lines().count(), kept.records.len());
    assert_eq!(History::parse(&text).unwrap(), kept);
    assert!(text.contains(r#"{"at_ms":10,"event":"sent","op":1,"outcome":"ok","offset":0}"#));
    let error = History::parse("\n{\"at_ms\":1,\"event\":\"over\"}\nnonsense\n").unwrap_err();
    assert!(error.to_string().starts_with("line 3:"), "{error}");
}
