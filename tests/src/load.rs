//! Records that keep coming to one topic while its broker dies and starts again, and what must be in the log of them.
//!
//! The one producer is idempotent and retries for as long as it takes, so of every partition: what is stored has the
//! numbers of what was sent, rising, each once; and what was acknowledged is among it, at the offset that was told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::flumen::Flumen;
use crate::kafka::{Place, Reports, Sender, read_between};

/// Keys that records have in turn; in a compacted topic the newest of each stays.
const KEYS: u64 = 97;

/// On their way at one time: enough that a death always meets some, few enough that the log grows and not the queue.
const UNACKNOWLEDGED_MAX: u64 = 400;

/// Digits of the number that a record's value begins with.
const DIGITS: usize = 12;

#[derive(Default)]
struct Switch {
    paused: AtomicBool,
    stopped: AtomicBool,
    sent: AtomicU64,
    bytes: AtomicU64,
}

pub struct Load {
    topic: String,
    compacted: bool,
    switch: Arc<Switch>,
    reports: Arc<Mutex<Reports>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    /// What was read at the last look, and where it ended.
    stored: BTreeMap<Place, u64>,
    ends: Vec<i64>,
    /// Where the look before that ended.
    ends_before: Vec<i64>,
}

impl Load {
    /// `pause` is between two records: how fast they come.
    pub fn start(flumen: &Flumen, topic: &str, compacted: bool, pause: Duration) -> anyhow::Result<Load> {
        Load::start_at(&flumen.kafka, topic, compacted, pause)
    }

    /// `kafka` may name several brokers.
    pub fn start_at(kafka: &str, topic: &str, compacted: bool, pause: Duration) -> anyhow::Result<Load> {
        // What a broker that stands still has been sent is sent again to another one after the time-out, not before.
        let settings = [("batch.size", "60000"), ("linger.ms", "3"), ("socket.timeout.ms", "4000")];
        let sender = Sender::new(kafka, &settings)?;
        let switch = Arc::new(Switch::default());
        let reports = sender.shared_reports();
        let thread = {
            let (switch, topic) = (switch.clone(), topic.to_string());
            std::thread::spawn(move || send(sender, &topic, &switch, pause))
        };
        Ok(Load {
            topic: topic.to_string(),
            compacted,
            switch,
            reports,
            thread: Some(thread),
            stored: BTreeMap::new(),
            ends: Vec::new(),
            ends_before: Vec::new(),
        })
    }

    pub fn pause(&self, paused: bool) {
        self.switch.paused.store(paused, Ordering::Relaxed);
    }

    /// Bytes handed to the producer so far.
    pub fn bytes(&self) -> u64 {
        self.switch.bytes.load(Ordering::Relaxed)
    }

    pub fn acknowledged_count(&self) -> usize {
        self.reports.lock().expect("no panic under this lock").places.len()
    }

    /// Of each partition that has any.
    pub fn acknowledged_counts(&self) -> BTreeMap<i32, usize> {
        let mut counts = BTreeMap::new();
        for (partition, _) in self.reports.lock().expect("no panic under this lock").places.keys() {
            *counts.entry(*partition).or_default() += 1;
        }
        counts
    }

    pub fn acknowledged(&self) -> BTreeMap<Place, u64> {
        self.reports.lock().expect("no panic under this lock").places.clone()
    }

    /// Sends no more, and waits until everything is acknowledged.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        self.switch.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow::anyhow!("the producer of {} panicked", self.topic))??;
        }
        let reports = self.reports.lock().expect("no panic under this lock");
        ensure!(reports.failed.is_empty(), "refused for good: {:?}", reports.failed.first());
        ensure!(
            reports.places.len() as u64 == self.switch.sent.load(Ordering::Relaxed),
            "not all acknowledged"
        );
        Ok(())
    }

    /// Reads what came since the look before the last, or `everything`, and compares: `acknowledged` are reports from
    /// before the broker's present life.
    pub fn check(
        &mut self,
        flumen: &Flumen,
        acknowledged: &BTreeMap<Place, u64>,
        everything: bool,
    ) -> anyhow::Result<()> {
        let ends = flumen.end_offsets(&self.topic)?;
        let begin = vec![0; ends.len()];
        for (before, end) in self.ends.iter().zip(&ends) {
            ensure!(before <= end, "{}: an end went from {before} to {end}", self.topic);
        }
        // What was compacted meanwhile can only be compared as a whole.
        let from = if everything || self.compacted || self.ends_before.is_empty() {
            &begin
        } else {
            &self.ends_before
        };
        let records = read_between(&flumen.kafka, &self.topic, from, &ends)?;
        let mut found = BTreeMap::new();
        for record in records {
            let number = number_of(&record.value).with_context(|| format!("at {:?}", record.place))?;
            ensure!(found.insert(record.place, number).is_none(), "{:?} came twice", record.place);
        }
        let wrong = |what: &str| format!("{}: {what}", self.topic);
        let sent = self.switch.sent.load(Ordering::Relaxed);
        let mut last: Option<(Place, u64)> = None;
        for (place, number) in &found {
            ensure!(*number < sent, wrong(&format!("{place:?} has {number}, which was never sent")));
            if let Some((at, before)) = last
                && at.0 == place.0
            {
                ensure!(
                    before < *number,
                    wrong(&format!("{number} at {place:?} follows {before} at {at:?}"))
                );
                ensure!(
                    self.compacted || at.1 + 1 == place.1,
                    wrong(&format!("a hole between {at:?} and {place:?}"))
                );
            }
            last = Some((*place, *number));
        }
        let in_range = |place: &Place| usize::try_from(place.0).is_ok_and(|p| from[p] <= place.1);
        for (place, number) in self.stored.iter().chain(acknowledged).filter(|(place, _)| in_range(place)) {
            match found.get(place) {
                Some(there) => {
                    ensure!(there == number, wrong(&format!("{place:?} has {there}, it was {number}")));
                }
                None if self.compacted => {
                    let newer = found
                        .range((place.0, place.1 + 1)..)
                        .take_while(|(at, _)| at.0 == place.0)
                        .any(|(_, newer)| newer % KEYS == number % KEYS);
                    ensure!(newer, wrong(&format!("{number} at {place:?}, the newest of its key, is gone")));
                }
                None => bail!(wrong(&format!("{number} was acknowledged at {place:?} and is gone"))),
            }
        }
        // Of a compacted log only what is there now can be asked for again.
        if self.compacted {
            self.stored = found;
        } else {
            self.stored.extend(found);
        }
        self.ends_before = std::mem::replace(&mut self.ends, ends);
        Ok(())
    }

    /// After `finish`: the log is what was acknowledged, no more and no less.
    pub fn check_all(&mut self, flumen: &Flumen) -> anyhow::Result<usize> {
        let acknowledged = self.acknowledged();
        self.stored.clear();
        self.check(flumen, &acknowledged, true)?;
        if self.compacted {
            for (place, number) in &self.stored {
                ensure!(acknowledged.get(place) == Some(number), "{}: {place:?} has {number}", self.topic);
            }
        } else {
            ensure!(self.stored == acknowledged, "{}: the log is not what was acknowledged", self.topic);
        }
        Ok(acknowledged.len())
    }
}

/// The number in a record's value, which must be what was sent under it.
pub fn number_of(value: &[u8]) -> anyhow::Result<u64> {
    let digits = value.get(..DIGITS).context("a value that is too short")?;
    let number = std::str::from_utf8(digits)?.parse()?;
    // All of a value follows from its number, but for its length.
    ensure!(value == value_of(number), "a value that was never sent");
    Ok(number)
}

fn value_of(number: u64) -> Vec<u8> {
    let mut value = format!("{number:0DIGITS$}").into_bytes();
    let length = 200 + usize::try_from(number.wrapping_mul(2_654_435_761) % 4_000).unwrap_or(0);
    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    while value.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        value.extend_from_slice(&state.to_le_bytes());
    }
    value
}

fn send(mut sender: Sender, topic: &str, switch: &Switch, pause: Duration) -> anyhow::Result<()> {
    let reports = sender.shared_reports();
    while !switch.stopped.load(Ordering::Relaxed) {
        let number = switch.sent.load(Ordering::Relaxed);
        let acknowledged = reports.lock().expect("no panic under this lock").places.len() as u64;
        if switch.paused.load(Ordering::Relaxed) || number - acknowledged >= UNACKNOWLEDGED_MAX {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        let value = value_of(number);
        // Counted first: what is read back is compared with it.
        switch.sent.store(number + 1, Ordering::Relaxed);
        switch.bytes.fetch_add(value.len() as u64, Ordering::Relaxed);
        sender.send(topic, &format!("k{}", number % KEYS), &value, number)?;
        std::thread::sleep(pause);
    }
    sender.flush()
}
