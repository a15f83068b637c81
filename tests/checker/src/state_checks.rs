//! What leaders, coordinators and observers said: fencing, ownership, watermarks, stale reads, liveness.

use std::collections::{BTreeMap, BTreeSet};

use crate::history::{Event, Outcome};
use crate::index::Index;

/// After a new incarnation of a producer got its epoch, nothing that an older one then begins is acknowledged; and in the
/// log no older epoch lies behind a newer one.
pub(crate) fn fencing(index: &Index<'_>) -> Vec<String> {
    let mut epochs: BTreeMap<u64, Vec<(usize, i32)>> = BTreeMap::new();
    for (place, record) in index.history.records.iter().enumerate() {
        if let Event::Fence { producer, epoch } = record.event {
            epochs.entry(producer).or_default().push((place, epoch));
        }
    }
    let mut found = Vec::new();
    for send in index.sends.iter().filter(|send| send.offset().is_some()) {
        let fences = epochs.get(&send.producer).into_iter().flatten();
        if let Some((_, epoch)) =
            fences.rev().find(|(place, epoch)| *place < send.place && *epoch > send.epoch)
        {
            found.push(format!(
                "producer {} wrote {} in epoch {} after epoch {epoch} was given out",
                send.producer, send.value, send.epoch
            ));
        }
    }
    for (partition, last) in &index.finals {
        let mut newest: BTreeMap<u64, i32> = BTreeMap::new();
        for (offset, value) in last.records {
            let Some(send) = index.send_of(*value) else { continue };
            let epoch = newest.entry(send.producer).or_insert(send.epoch);
            if send.epoch < *epoch {
                found.push(format!(
                    "{partition} offset {offset}: epoch {} of producer {} behind epoch {epoch}",
                    send.epoch, send.producer
                ));
            }
            *epoch = send.epoch.max(*epoch);
        }
    }
    found
}

/// In one generation of a group a partition has one owner, and generations go forward.
pub(crate) fn group_ownership(index: &Index<'_>) -> Vec<String> {
    let mut owners: BTreeMap<(&str, i64, &str), BTreeSet<&str>> = BTreeMap::new();
    let mut generations: BTreeMap<(&str, &str), i64> = BTreeMap::new();
    let mut found = Vec::new();
    for record in &index.history.records {
        let Event::Assigned { group, generation, member, partitions } = &record.event else { continue };
        let before = generations.insert((group, member), *generation);
        if before.is_some_and(|before| before > *generation) {
            found.push(format!("member {member} of {group} went from generation {before:?} to {generation}"));
        }
        for partition in partitions {
            let owners = owners.entry((group, *generation, partition)).or_default();
            owners.insert(member);
            if owners.len() == 2 {
                found.push(format!("{group} generation {generation}: {partition} belongs to {owners:?}"));
            }
        }
    }
    found
}

/// Watermarks do not go back for anybody who looks, and the last stable offset is no higher than the high watermark.
pub(crate) fn watermarks_back(index: &Index<'_>) -> Vec<String> {
    let mut seen: BTreeMap<(u64, &str), (i32, i64, i64)> = BTreeMap::new();
    let mut found = Vec::new();
    for record in &index.history.records {
        let Event::Watermarks { observer, partition, leader_epoch, high_watermark, last_stable } =
            &record.event
        else {
            continue;
        };
        if last_stable > high_watermark {
            found.push(format!(
                "{partition}: last stable {last_stable} above high watermark {high_watermark}"
            ));
        }
        let now = (*leader_epoch, *high_watermark, *last_stable);
        let Some(before) = seen.insert((*observer, partition), now) else { continue };
        // An observer may ask an old leader later; it must not believe it, and the checker does not either.
        if now.0 < before.0 {
            seen.insert((*observer, partition), before);
        } else if now.1 < before.1 || now.2 < before.2 {
            found.push(format!("observer {observer} of {partition}: {before:?}, then {now:?}"));
        }
    }
    found
}

/// Who asks a leader for the end of a partition after a record was acknowledged is told of it.
pub(crate) fn stale_reads(index: &Index<'_>) -> Vec<String> {
    let mut acknowledged: BTreeMap<&str, i64> = BTreeMap::new();
    let mut asked: BTreeMap<u64, (&str, i64)> = BTreeMap::new();
    let by_op: BTreeMap<u64, &crate::index::Send<'_>> =
        index.sends.iter().map(|send| (send.op, send)).collect();
    let mut found = Vec::new();
    for record in &index.history.records {
        match &record.event {
            Event::Sent { op, outcome: Outcome::Ok, offset: Some(offset) } => {
                if let Some(send) = by_op.get(op) {
                    let end = acknowledged.entry(send.partition).or_insert(0);
                    *end = (*end).max(offset + 1);
                }
            }
            Event::AskEnd { op, partition } => {
                let least = acknowledged.get(partition.as_str()).copied().unwrap_or(0);
                asked.insert(*op, (partition, least));
            }
            Event::End { op, offset } => {
                if let Some((partition, least)) = asked.remove(op) {
                    if *offset < least {
                        found.push(format!(
                            "{partition}: told that it ends at {offset} when {least} was acknowledged"
                        ));
                    }
                    let end = acknowledged.entry(partition).or_insert(0);
                    *end = (*end).max(*offset);
                }
            }
            _ => {}
        }
    }
    found
}

/// After everything healed, every partition that is written to takes a record in time, nothing hangs, and all can be read.
pub(crate) fn liveness(index: &Index<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let records = &index.history.records;
    let Some(healed) = records.iter().rposition(|r| matches!(r.event, Event::Healed { .. })) else {
        return found;
    };
    let Event::Healed { bound_ms } = records[healed].event else { return found };
    let by = records[healed].at_ms + bound_ms;
    let partitions: BTreeSet<&str> = index.sends.iter().map(|send| send.partition).collect();
    for partition in &partitions {
        let in_time = index.sends.iter().any(|send| {
            send.partition == *partition
                && send.offset().is_some()
                && send.ended_ms.is_some_and(|at| at <= by)
                && send.outcome.is_some_and(|(place, ..)| place > healed)
        });
        if !in_time {
            found.push(format!("{partition} took nothing within {bound_ms} ms after everything healed"));
        }
        if !index.finals.contains_key(partition) {
            found.push(format!("{partition} could not be read at the end"));
        }
    }
    if records.iter().any(|r| matches!(r.event, Event::Over)) {
        let hanging = index.sends.iter().filter(|send| send.place > healed && send.outcome.is_none());
        found.extend(hanging.map(|send| format!("send {} at {} ms was never answered", send.op, send.at_ms)));
    }
    found
}
