//! Transactions: what must not be seen, not yet, or not in part, and who saw whom in a circle.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::cycles;
use crate::index::Index;

/// Nobody who reads committed records gets one of an aborted transaction, and nobody at all one whose write failed.
pub(crate) fn aborted_reads(index: &Index<'_>) -> Vec<String> {
    let bad = |value: u64, committed_only: bool| {
        index.send_of(value).is_some_and(|send| {
            let aborted = send.txn.is_some_and(|txn| index.txns.get(&txn).is_some_and(|t| t.aborted()));
            send.failed() || (committed_only && aborted)
        })
    };
    let mut found = Vec::new();
    for poll in &index.polls {
        let values = poll.records.iter().filter(|(_, value)| bad(*value, poll.committed_only));
        found.extend(values.map(|(at, value)| {
            format!(
                "consumer {} read {value} at {} offset {at}, which was aborted",
                poll.consumer, poll.partition
            )
        }));
    }
    for (partition, last) in &index.finals {
        let values = last.committed.iter().filter(|value| bad(**value, true));
        found.extend(values.map(|value| format!("{partition}: {value} is read at the end and was aborted")));
    }
    found
}

/// Nothing of a transaction is read before its commit was asked for.
pub(crate) fn precommitted_reads(index: &Index<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for poll in index.polls.iter().filter(|poll| poll.committed_only) {
        for (_, value) in poll.records {
            let Some(txn) = index.send_of(*value).and_then(|send| send.txn) else { continue };
            let asked = index.txns.get(&txn).and_then(|t| t.commit_asked);
            if asked.is_none_or(|place| place > poll.place) {
                found.push(format!(
                    "consumer {} read {value} of transaction {txn} before its commit",
                    poll.consumer
                ));
            }
        }
    }
    for value in index.finals.values().flat_map(|last| last.committed) {
        let Some(txn) = index.send_of(*value).and_then(|send| send.txn) else { continue };
        if index.txns.get(&txn).is_none_or(|t| t.commit_asked.is_none()) {
            found.push(format!(
                "{value} of transaction {txn} is read at the end, and nobody asked for its commit"
            ));
        }
    }
    found
}

/// Of a transaction all is read in the end, or nothing.
pub(crate) fn torn_transactions(index: &Index<'_>) -> Vec<String> {
    let visible: BTreeSet<u64> = index.finals.values().flat_map(|last| last.committed).copied().collect();
    let mut parts: BTreeMap<u64, (Vec<u64>, Vec<u64>)> = BTreeMap::new();
    for send in &index.sends {
        let (Some(txn), Some(offset)) = (send.txn, send.offset()) else { continue };
        let Some(last) = index.finals.get(send.partition) else { continue };
        if offset < last.log_start {
            continue;
        }
        let (seen, unseen) = parts.entry(txn).or_default();
        if visible.contains(&send.value) { seen.push(send.value) } else { unseen.push(send.value) }
    }
    let torn = parts.iter().filter(|(_, (seen, unseen))| !seen.is_empty() && !unseen.is_empty());
    torn.map(|(txn, (seen, unseen))| format!("transaction {txn}: {seen:?} is read, {unseen:?} is not"))
        .collect()
}

/// G0: transactions whose records lie between each other's, each before the other in some partition.
pub(crate) fn write_cycles(index: &Index<'_>) -> Vec<String> {
    tell(cycles(&write_edges(index)))
}

/// G1c: transactions of which each read what the other wrote, directly or in a circle.
pub(crate) fn read_cycles(index: &Index<'_>) -> Vec<String> {
    tell(cycles(&read_edges(index)))
}

fn tell(cycles: Vec<Vec<u64>>) -> Vec<String> {
    cycles
        .into_iter()
        .map(|cycle| format!("transactions {cycle:?} depend on each other in a circle"))
        .collect()
}

fn write_edges(index: &Index<'_>) -> BTreeMap<u64, BTreeSet<u64>> {
    let mut edges: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for last in index.finals.values() {
        let txns =
            last.records.iter().filter_map(|(_, value)| index.send_of(*value).and_then(|send| send.txn));
        let txns: Vec<u64> = txns.collect();
        for pair in txns.windows(2).filter(|pair| pair[0] != pair[1]) {
            edges.entry(pair[0]).or_default().insert(pair[1]);
        }
    }
    edges
}

fn read_edges(index: &Index<'_>) -> BTreeMap<u64, BTreeSet<u64>> {
    let mut edges: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for poll in &index.polls {
        let Some(reader) = poll.txn else { continue };
        for (_, value) in poll.records {
            if let Some(writer) = index.send_of(*value).and_then(|send| send.txn)
                && writer != reader
            {
                edges.entry(writer).or_default().insert(reader);
            }
        }
    }
    edges
}
