//! Judges a history: what producers, consumers and observers saw of a cluster, whether simulated or of real processes.
//!
//! Pure: a history in, anomalies out. Each check stands for itself and is named; `tests/planted.rs` plants each anomaly in
//! three ways into a history that is honest, so that a check that sees nothing is itself seen.
//!
//! What it does not do: run anything, or guess. What a history does not say is not judged: a partition without a final read
//! has nothing lost.
#![forbid(unsafe_code)]

mod graph;
mod history;
mod index;
mod log_checks;
mod state_checks;
mod txn_checks;

pub use history::{Event, History, Outcome, ParseError, Record};

use index::Index;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anomaly {
    pub check: &'static str,
    pub what: String,
}

type Check = fn(&Index<'_>) -> Vec<String>;

/// Every check by its name. `write-cycle` is what Kafka's transactions allow, as they do not isolate writes: see `Options`.
const CHECKS: [(&str, Check); 19] = [
    ("lost-write", log_checks::lost_writes),
    ("duplicate", log_checks::duplicates),
    ("inconsistent-offset", log_checks::inconsistent_offsets),
    ("nonmonotonic-send", log_checks::nonmonotonic_sends),
    ("reordered", log_checks::reordered),
    ("nonmonotonic-poll", log_checks::nonmonotonic_polls),
    ("poll-skip", log_checks::poll_skips),
    ("phantom", log_checks::phantoms),
    ("replicas-differ", log_checks::replicas_differ),
    ("export-differs", log_checks::export_differs),
    ("fencing", state_checks::fencing),
    ("group-ownership", state_checks::group_ownership),
    ("watermark-back", state_checks::watermarks_back),
    ("stale-read", state_checks::stale_reads),
    ("liveness", state_checks::liveness),
    ("aborted-read", txn_checks::aborted_reads),
    ("precommitted-read", txn_checks::precommitted_reads),
    ("torn-transaction", txn_checks::torn_transactions),
    ("read-cycle", txn_checks::read_cycles),
];

const WRITE_CYCLE: (&str, Check) = ("write-cycle", txn_checks::write_cycles);

#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Transactions never ran at the same time on the same partitions, so that their records may not lie between each other.
    pub isolated_writes: bool,
}

/// Their names.
pub fn check_names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().chain([&WRITE_CYCLE]).map(|(name, _)| *name)
}

pub fn check(history: &History, options: Options) -> Vec<Anomaly> {
    let index = Index::of(history);
    let write_cycle = options.isolated_writes.then_some(&WRITE_CYCLE);
    CHECKS
        .iter()
        .chain(write_cycle)
        .flat_map(|(name, run)| run(&index).into_iter().map(|what| Anomaly { check: name, what }))
        .collect()
}
