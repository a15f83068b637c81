//! What became of single records: lost, doubled, moved, out of order, exported.

use std::collections::{BTreeMap, BTreeSet};

use crate::history::Event;
use crate::index::{Index, Poll};

/// An acknowledged record is in the log at the end, where the acknowledgement said, unless retention took it.
pub(crate) fn lost_writes(index: &Index<'_>) -> Vec<String> {
    let logs: BTreeMap<_, BTreeMap<i64, u64>> =
        index.finals.iter().map(|(name, last)| (*name, last.records.iter().copied().collect())).collect();
    let lost = |send: &&crate::index::Send<'_>| {
        let (Some(offset), Some(last)) = (send.offset(), index.finals.get(send.partition)) else {
            return false;
        };
        offset >= last.log_start && logs[send.partition].get(&offset) != Some(&send.value)
    };
    let tell = |send: &crate::index::Send<'_>| {
        format!(
            "value {} was acknowledged at {} offset {:?} and is not there",
            send.value,
            send.partition,
            send.offset()
        )
    };
    let mut found: Vec<String> = index.sends.iter().filter(lost).map(tell).collect();
    for (partition, last) in &index.finals {
        let committed: BTreeSet<u64> = last.committed.iter().copied().collect();
        let visible = |send: &&crate::index::Send<'_>| {
            let of_txn = send.txn.is_none_or(|txn| index.txns.get(&txn).is_some_and(|t| t.committed()));
            send.partition == *partition && send.offset().is_some_and(|o| o >= last.log_start) && of_txn
        };
        let unseen = index.sends.iter().filter(visible).filter(|send| !committed.contains(&send.value));
        found.extend(
            unseen.map(|send| format!("value {} of {partition} is committed and never read", send.value)),
        );
    }
    found
}

/// A value lies in one place.
pub(crate) fn duplicates(index: &Index<'_>) -> Vec<String> {
    let mut places: BTreeMap<u64, BTreeSet<(&str, i64)>> = BTreeMap::new();
    for (partition, offset, value, _) in index.sightings() {
        places.entry(value).or_default().insert((partition, offset));
    }
    let mut found: Vec<String> = places
        .iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(value, places)| format!("value {value} lies at {places:?}"))
        .collect();
    for (partition, last) in &index.finals {
        let mut seen = BTreeSet::new();
        let twice = last.committed.iter().filter(|value| !seen.insert(**value));
        found.extend(twice.map(|value| format!("value {value} of {partition} is read twice")));
    }
    found
}

/// An offset holds one value, whoever looks and whenever.
pub(crate) fn inconsistent_offsets(index: &Index<'_>) -> Vec<String> {
    let mut values: BTreeMap<(&str, i64), BTreeMap<u64, String>> = BTreeMap::new();
    for (partition, offset, value, who) in index.sightings() {
        values.entry((partition, offset)).or_default().entry(value).or_insert(who);
    }
    let several = values.iter().filter(|(_, values)| values.len() > 1);
    several.map(|((partition, offset), values)| format!("{partition} offset {offset}: {values:?}")).collect()
}

/// Acknowledged offsets of one producer and partition rise as it sent.
pub(crate) fn nonmonotonic_sends(index: &Index<'_>) -> Vec<String> {
    let mut last: BTreeMap<(u64, &str), (i64, u64)> = BTreeMap::new();
    let mut found = Vec::new();
    for send in &index.sends {
        let Some(offset) = send.offset() else { continue };
        let key = (send.producer, send.partition);
        if let Some((before, value)) = last.insert(key, (offset, send.value))
            && before >= offset
        {
            found.push(format!(
                "producer {} sent {value}, then {}, to {}: offsets {before} and {offset}",
                send.producer, send.value, send.partition
            ));
        }
    }
    found
}

/// In the log, too, the records of one producer lie as it sent them, acknowledged or not.
pub(crate) fn reordered(index: &Index<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for (partition, last) in &index.finals {
        let mut newest: BTreeMap<u64, (usize, u64)> = BTreeMap::new();
        for (_, value) in last.records {
            let Some(send) = index.send_of(*value) else { continue };
            if let Some((place, before)) = newest.insert(send.producer, (send.place, *value))
                && place > send.place
            {
                found.push(format!("{partition}: {value} was sent before {before} and lies behind it"));
            }
        }
    }
    found
}

/// Every two offsets that a consumer got one after the other, but over a seek: the poll of the second, and both.
fn steps<'a>(index: &'a Index<'_>) -> impl Iterator<Item = (&'a Poll<'a>, i64, i64)> {
    let mut positions: BTreeMap<(u64, &str), i64> = BTreeMap::new();
    index.polls.iter().flat_map(move |poll| {
        let key = (poll.consumer, poll.partition);
        if poll.seek {
            positions.remove(&key);
        }
        let step = |(offset, _): &(i64, u64)| Some((poll, positions.insert(key, *offset)?, *offset));
        poll.records.iter().filter_map(step).collect::<Vec<_>>()
    })
}

/// A consumer goes forward.
pub(crate) fn nonmonotonic_polls(index: &Index<'_>) -> Vec<String> {
    steps(index)
        .filter(|(_, before, offset)| before >= offset)
        .map(|(poll, before, offset)| {
            format!("consumer {} got offset {offset} of {} after {before}", poll.consumer, poll.partition)
        })
        .collect()
}

/// A consumer leaves nothing out that it should have been given.
pub(crate) fn poll_skips(index: &Index<'_>) -> Vec<String> {
    let committed: BTreeMap<&str, BTreeSet<u64>> =
        index.finals.iter().map(|(name, last)| (*name, last.committed.iter().copied().collect())).collect();
    let mut found = Vec::new();
    for (poll, before, offset) in steps(index) {
        let Some(last) = index.finals.get(poll.partition) else { continue };
        let given = |value: &u64| !poll.committed_only || committed[poll.partition].contains(value);
        let between = |(at, value): &&(i64, u64)| *at > before && *at < offset && given(value);
        for (at, value) in last.records.iter().filter(between) {
            found.push(format!(
                "consumer {} went from {before} to {offset} of {} past {value} at {at}",
                poll.consumer, poll.partition
            ));
        }
    }
    found
}

/// Values come from somebody who sent them, to where they were sent.
pub(crate) fn phantoms(index: &Index<'_>) -> Vec<String> {
    let strange = |(partition, _, value, _): &(&str, i64, u64, String)| {
        index.send_of(*value).is_none_or(|send| send.partition != *partition)
    };
    let sightings = index.sightings().into_iter().filter(strange);
    sightings
        .map(|(partition, offset, value, who)| {
            format!("{who} saw {value} at {partition} offset {offset}, where nobody sent it")
        })
        .collect()
}

/// Replicas are the same below the high watermark.
pub(crate) fn replicas_differ(index: &Index<'_>) -> Vec<String> {
    let mut digests: BTreeMap<(&str, i64), BTreeMap<u64, BTreeSet<u64>>> = BTreeMap::new();
    for record in &index.history.records {
        if let Event::Digest { node, partition, up_to, digest } = &record.event {
            digests.entry((partition, *up_to)).or_default().entry(*digest).or_default().insert(*node);
        }
    }
    let several = digests.iter().filter(|(_, digests)| digests.len() > 1);
    several
        .map(|((partition, up_to), digests)| {
            format!("{partition} below {up_to}: nodes {:?} differ", digests.values().collect::<Vec<_>>())
        })
        .collect()
}

/// The table has every committed record below what the export is done with, once, and nothing else.
pub(crate) fn export_differs(index: &Index<'_>) -> Vec<String> {
    let mut rows: BTreeMap<&str, BTreeMap<i64, Vec<u64>>> = BTreeMap::new();
    let mut done: BTreeMap<&str, i64> = BTreeMap::new();
    for record in &index.history.records {
        match &record.event {
            Event::ExportRow { partition, offset, value } => {
                rows.entry(partition).or_default().entry(*offset).or_default().push(*value);
            }
            Event::Exported { partition, up_to } => {
                done.insert(partition, *up_to);
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    for (partition, last) in &index.finals {
        let committed: BTreeSet<u64> = last.committed.iter().copied().collect();
        let log: BTreeMap<i64, u64> =
            last.records.iter().copied().filter(|(_, value)| committed.contains(value)).collect();
        let empty = BTreeMap::new();
        let table = rows.get(partition).unwrap_or(&empty);
        for (offset, values) in table {
            match log.get(offset) {
                _ if values.len() > 1 => {
                    found.push(format!("{partition} offset {offset} is in the table twice"))
                }
                Some(value) if *value == values[0] => {}
                // Exported before retention took it.
                None if *offset < last.log_start => {}
                in_log => found.push(format!(
                    "{partition} offset {offset}: the table has {}, the log {in_log:?}",
                    values[0]
                )),
            }
        }
        let up_to = done.get(partition).copied().unwrap_or(0);
        let missing = log.range(..up_to.max(0)).filter(|(offset, _)| !table.contains_key(offset));
        found.extend(
            missing
                .map(|(offset, value)| format!("{partition} offset {offset}: {value} is not in the table")),
        );
    }
    found
}
