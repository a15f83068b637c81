//! The delivery machine against a model of a MergeTree table: tokens per table partition, parts that vanish while their
//! token stays and the other way round, answers and requests that get lost, inserts that arrive late, crashes of the
//! broker between any two steps.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::plan::{Origin, Range};

const EXACT: Traits =
    Traits { read_back: true, deduplicates: true, token_commits_with_part: false, has_views: false };

fn plan(ranges: &[u64], look_first: bool) -> Plan {
    let mut first = 0;
    let ranges: Vec<Range> = (0i32..)
        .zip(ranges)
        .map(|(partition, rows)| {
            let range = Range { partition, first, last: first + *rows as i64, rows: *rows };
            first += 100;
            range
        })
        .collect();
    Plan {
        topic_id: [7; 16],
        sink_epoch: 1,
        seq: 0,
        rows: ranges.iter().map(|r| r.rows).sum(),
        ranges,
        dead_letters: 1,
        skipped: 0,
        dlq_first_sequence: 0,
        mapping_version: 1,
        encoder_version: 1,
        block_crc: 0,
        block_bytes: 0,
        origin: Origin::Log,
        rejected: Vec::new(),
        server_started_s: 1000,
        look_first,
    }
}

/// A row is its place; table partitions are chosen by offset.
type Row = (i32, i64);

fn table_partition(row: Row) -> i64 {
    row.1 % 3
}

#[derive(Clone, Debug, Default)]
struct Table {
    started_s: i64,
    rows: BTreeMap<Row, u32>,
    tokens: BTreeSet<(i64, String)>,
    /// On their way, seen by nobody.
    late: Vec<(String, BTreeSet<Row>)>,
}

/// What a crash leaves of one part.
#[derive(Clone, Copy, Debug)]
enum Left {
    Nothing,
    Both,
    /// The order of older sources: the token is logged before the part is committed.
    TokenOnly,
    /// The order of newer ones.
    PartOnly,
}

impl Table {
    fn insert(&mut self, token: &str, rows: &BTreeSet<Row>, crash: Option<[Left; 3]>) {
        for part in 0..3 {
            let key = (part, token.to_owned());
            let of_part: Vec<Row> = rows.iter().copied().filter(|r| table_partition(*r) == part).collect();
            if of_part.is_empty() || self.tokens.contains(&key) {
                continue;
            }
            let left = crash.map_or(Left::Both, |crash| crash[part as usize]);
            if matches!(left, Left::Both | Left::TokenOnly) {
                self.tokens.insert(key);
            }
            if matches!(left, Left::Both | Left::PartOnly) {
                for row in of_part {
                    *self.rows.entry(row).or_default() += 1;
                }
            }
        }
        if crash.is_some() {
            self.started_s += 10;
            // Connections to the old process died with it.
            self.late.clear();
        }
    }

    fn arrive_late(&mut self) {
        if let Some((token, rows)) = self.late.pop() {
            self.insert(&token, &rows, None);
        }
    }

    fn found(&self, plan: &Plan) -> Vec<Found> {
        plan.ranges
            .iter()
            .map(|range| {
                let inside = self
                    .rows
                    .iter()
                    .filter(|((p, o), _)| *p == range.partition && (range.first..=range.last).contains(o));
                let (mut rows, mut offsets) = (0, 0);
                for (_, count) in inside {
                    rows += u64::from(*count);
                    offsets += 1;
                }
                Found { rows, offsets }
            })
            .collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Fate {
    Acknowledged,
    RequestLost,
    AnswerLost,
    Late,
    Busy,
    Crash([Left; 3]),
}

fn left() -> impl Strategy<Value = Left> {
    prop_oneof![Just(Left::Nothing), Just(Left::Both), Just(Left::TokenOnly), Just(Left::PartOnly)]
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        Just(Fate::Acknowledged),
        Just(Fate::RequestLost),
        Just(Fate::AnswerLost),
        Just(Fate::Late),
        Just(Fate::Busy),
        [left(), left(), left()].prop_map(Fate::Crash),
    ]
}

/// What happens around each step of the machine.
#[derive(Clone, Debug)]
struct Step {
    fate: Fate,
    broker_crash: bool,
    late_arrival: bool,
}

fn step() -> impl Strategy<Value = Step> {
    (fate(), proptest::bool::weighted(0.2), proptest::bool::weighted(0.3))
        .prop_map(|(fate, broker_crash, late_arrival)| Step { fate, broker_crash, late_arrival })
}

/// What the state log keeps.
#[derive(Clone, Copy, Debug, Default)]
struct Durable {
    dead_letters_written: bool,
    repairs: u32,
    repair_crc: u32,
}

/// Runs one plan to its end; the fates given come first, then everything goes well. Returns the dead-letter batches
/// written (by sequence, so repetitions do not count).
fn deliver(plan: &Plan, table: &mut Table, steps: &[Step]) -> Result<BTreeSet<i32>, Alarm> {
    let all: BTreeSet<Row> = plan
        .ranges
        .iter()
        .flat_map(|r| (r.first..r.first + r.rows as i64).map(|offset| (r.partition, offset)))
        .collect();
    let mut durable = Durable::default();
    let mut letters = BTreeSet::new();
    let mut steps = steps.iter();
    let mut machine = Delivery::new(plan, false, 0, EXACT);
    let mut event = Event::Fresh;
    let mut acknowledged = None;
    for _ in 0..10_000 {
        let calm = Step { fate: Fate::Acknowledged, broker_crash: false, late_arrival: true };
        let happening = steps.next().cloned().unwrap_or(calm);
        if happening.late_arrival {
            table.arrive_late();
        }
        let action = machine.step(event);
        let send = |table: &mut Table, token: &str, rows: &BTreeSet<Row>| match happening.fate {
            Fate::Acknowledged => {
                table.insert(token, rows, None);
                Sent::Acknowledged
            }
            Fate::RequestLost => Sent::Failed(Class::Ambiguous),
            Fate::Busy => Sent::Failed(Class::Transient),
            Fate::AnswerLost => {
                table.insert(token, rows, None);
                Sent::Failed(Class::Ambiguous)
            }
            Fate::Late => {
                table.late.push((token.to_owned(), rows.clone()));
                Sent::Failed(Class::Ambiguous)
            }
            Fate::Crash(left) => {
                table.insert(token, rows, Some(left));
                Sent::Failed(Class::Ambiguous)
            }
        };
        event = match action {
            Action::WriteDeadLetters => {
                letters.insert(plan.dlq_first_sequence);
                // A crash between the write and its record repeats it under the same sequence.
                if !happening.broker_crash {
                    durable.dead_letters_written = true;
                }
                Event::DeadLettersWritten
            }
            Action::Send => {
                machine.sending_to(table.started_s);
                Event::Sent(send(table, "token", &all))
            }
            Action::AwaitQuiet => Event::Quiet,
            Action::ReadBack => Event::Found { found: table.found(plan), server_started_s: table.started_s },
            Action::Repair => {
                let missing: BTreeSet<Row> =
                    all.iter().copied().filter(|row| !table.rows.contains_key(row)).collect();
                let crc = crc32c::crc32c(format!("{missing:?}").as_bytes());
                let n = repair_number(durable.repairs, durable.repair_crc, crc, acknowledged);
                durable.repairs = n;
                durable.repair_crc = crc;
                let sent = send(table, &format!("token~r{n}"), &missing);
                acknowledged = (sent == Sent::Acknowledged).then_some(n);
                Event::Repaired(sent)
            }
            Action::Settle => return Ok(letters),
            Action::BackOff(_) => {
                machine = Delivery::new(plan, durable.dead_letters_written, durable.repairs, EXACT);
                acknowledged = None;
                Event::Resume
            }
            Action::Alarm(alarm) => return Err(alarm),
            Action::Split(class) => panic!("nothing was refused, yet a split for {class:?}"),
        };
        if happening.broker_crash {
            machine = Delivery::new(plan, durable.dead_letters_written, durable.repairs, EXACT);
            acknowledged = None;
            event = Event::Resume;
        }
    }
    panic!("the plan is never settled");
}

fn assert_exact(plan: &Plan, table: &Table) {
    for (range, found) in plan.ranges.iter().zip(table.found(plan)) {
        assert_eq!(found, Found { rows: range.rows, offsets: range.rows });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn exactly_once_through_anything(
        rows in proptest::collection::vec(0u64..6, 1..4),
        steps in proptest::collection::vec(step(), 0..14),
    ) {
        let plan = plan(&rows, false);
        let mut table = Table { started_s: 1000, ..Table::default() };
        let letters = deliver(&plan, &mut table, &steps);
        prop_assert_eq!(letters, Ok(BTreeSet::from([0])));
        // What is still on its way must not double anything either.
        while !table.late.is_empty() {
            table.arrive_late();
        }
        assert_exact(&plan, &table);
    }

    #[test]
    fn replay_over_rows_that_are_there(
        rows in proptest::collection::vec(1u64..6, 1..4),
        there in proptest::collection::vec(any::<bool>(), 18),
        steps in proptest::collection::vec(step(), 0..10),
    ) {
        let plan = plan(&rows, true);
        let mut table = Table { started_s: 1000, ..Table::default() };
        let mut there = there.iter().cycle();
        for range in &plan.ranges {
            for offset in range.first..range.first + range.rows as i64 {
                if *there.next().unwrap_or(&false) {
                    table.rows.insert((range.partition, offset), 1);
                }
            }
        }
        prop_assert_eq!(deliver(&plan, &mut table, &steps), Ok(BTreeSet::from([0])));
        while !table.late.is_empty() {
            table.arrive_late();
        }
        assert_exact(&plan, &table);
    }
}

fn found(rows: u64) -> Event {
    Event::Found { found: vec![Found { rows, offsets: rows }], server_started_s: 1000 }
}

fn machine(traits: Traits) -> Delivery {
    let mut plan = plan(&[3], false);
    plan.dead_letters = 0;
    Delivery::new(&plan, true, 0, traits)
}

#[test]
fn the_usual_way_is_one_insert_without_a_look() {
    let mut m = machine(EXACT);
    assert_eq!(m.step(Event::Fresh), Action::Send);
    assert_eq!(m.step(Event::Sent(Sent::Acknowledged)), Action::Settle);
}

#[test]
fn surplus_stops_the_export() {
    let mut m = machine(EXACT);
    assert_eq!(m.step(Event::Resume), Action::AwaitQuiet);
    assert_eq!(m.step(Event::Quiet), Action::ReadBack);
    assert_eq!(m.step(found(4)), Action::Alarm(Alarm::DuplicatesDetected));
    // As many rows as planned, but one of them twice.
    let mut m = machine(EXACT);
    let twice = Event::Found { found: vec![Found { rows: 3, offsets: 2 }], server_started_s: 1000 };
    assert_eq!(m.step(twice), Action::Alarm(Alarm::DuplicatesDetected));
}

#[test]
fn refused_blocks_split_only_after_a_look() {
    for class in [Class::BadRows, Class::Resource, Class::BatchShape] {
        let mut m = machine(EXACT);
        m.step(Event::Fresh);
        assert_eq!(m.step(Event::Sent(Sent::Failed(class))), Action::AwaitQuiet);
        m.step(Event::Quiet);
        assert_eq!(m.step(found(0)), Action::Split(class));
        // Rows are there after all: no split.
        let mut m = machine(EXACT);
        m.step(Event::Fresh);
        m.step(Event::Sent(Sent::Failed(class)));
        m.step(Event::Quiet);
        assert_eq!(m.step(found(3)), Action::Settle);
    }
}

#[test]
fn weaker_deliveries_repeat_without_a_look() {
    let mut m = machine(Traits { read_back: false, ..EXACT });
    assert_eq!(m.step(Event::Resume), Action::Send);
    assert_eq!(m.step(Event::Sent(Sent::Failed(Class::Ambiguous))), Action::BackOff(Class::Ambiguous));
    assert_eq!(m.step(Event::Resume), Action::Send);
    assert_eq!(m.step(Event::Sent(Sent::Acknowledged)), Action::Settle);
}

#[test]
fn replicated_views_are_healed_by_a_resend() {
    let mut m = machine(Traits { token_commits_with_part: true, has_views: true, ..EXACT });
    m.step(Event::Resume);
    m.step(Event::Quiet);
    assert_eq!(m.step(found(3)), Action::Send);
    assert_eq!(m.step(Event::Sent(Sent::Acknowledged)), Action::ReadBack);
    assert_eq!(m.step(found(3)), Action::Settle);
}

#[test]
fn repairs_are_bounded() {
    let mut m = machine(EXACT);
    m.step(Event::Resume);
    m.step(Event::Quiet);
    m.step(found(0));
    m.step(Event::Sent(Sent::Acknowledged));
    for _ in 0..MAX_REPAIRS {
        assert_eq!(m.step(found(1)), Action::Repair);
        assert_eq!(m.step(Event::Repaired(Sent::Acknowledged)), Action::ReadBack);
    }
    assert_eq!(m.step(found(1)), Action::Alarm(Alarm::RepairsExhausted));
}

#[test]
fn plans_without_rows_settle_after_their_dead_letters() {
    let plan = plan(&[0, 0], false);
    let mut m = Delivery::new(&plan, false, 0, EXACT);
    assert_eq!(m.step(Event::Fresh), Action::WriteDeadLetters);
    assert_eq!(m.step(Event::DeadLettersWritten), Action::Settle);
}
