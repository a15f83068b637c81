//! What clients and observers saw, in the order in which they saw it; one JSON object a line when it is kept.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub at_ms: u64,
    #[serde(flatten)]
    pub event: Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// With the offset.
    Ok,
    /// Certainly not written.
    Failed,
    /// Time-out, lost connection, dead client.
    Unknown,
}

/// Values are unique over the whole history. Partitions are named as `topic-index`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A producer starts to send; `op` is unique.
    Send {
        op: u64,
        producer: u64,
        epoch: i32,
        partition: String,
        value: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        txn: Option<u64>,
    },
    Sent {
        op: u64,
        outcome: Outcome,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<i64>,
    },
    /// A new incarnation of a producer was given this epoch: older ones are fenced from here on.
    Fence {
        producer: u64,
        epoch: i32,
    },
    /// A client asks for the end of a transaction.
    TxnEnd {
        txn: u64,
        commit: bool,
    },
    TxnEnded {
        txn: u64,
        outcome: Outcome,
    },
    /// What a consumer got. `seek`: its position was set anew before.
    Poll {
        consumer: u64,
        partition: String,
        records: Vec<(i64, u64)>,
        #[serde(default)]
        committed_only: bool,
        #[serde(default)]
        seek: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        txn: Option<u64>,
    },
    /// The whole partition, read after everything had healed. `committed`: the values a `read_committed` reader gets.
    FinalRead {
        partition: String,
        log_start: i64,
        records: Vec<(i64, u64)>,
        committed: Vec<u64>,
    },
    /// A client asks a leader where the partition ends, and is told.
    AskEnd {
        op: u64,
        partition: String,
    },
    End {
        op: u64,
        offset: i64,
    },
    /// What an observer saw of a replica.
    Watermarks {
        observer: u64,
        partition: String,
        leader_epoch: i32,
        high_watermark: i64,
        last_stable: i64,
    },
    /// Digest of a replica's log from its start to `up_to`, which is no higher than its high watermark.
    Digest {
        node: u64,
        partition: String,
        up_to: i64,
        digest: u64,
    },
    Assigned {
        group: String,
        generation: i64,
        member: String,
        partitions: Vec<String>,
    },
    ExportRow {
        partition: String,
        offset: i64,
        value: u64,
    },
    /// The export says that it is done with everything below.
    Exported {
        partition: String,
        up_to: i64,
    },
    /// No fault is left; every partition must take a record within the bound.
    Healed {
        bound_ms: u64,
    },
    /// Nothing comes after this.
    Over,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    pub records: Vec<Record>,
}

#[derive(Debug, thiserror::Error)]
#[error("line {line}: {source}")]
pub struct ParseError {
    line: usize,
    source: serde_json::Error,
}

impl History {
    pub fn push(&mut self, at_ms: u64, event: Event) {
        self.records.push(Record { at_ms, event });
    }

    pub fn parse(text: &str) -> Result<History, ParseError> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let records = lines
            .map(|(at, line)| {
                serde_json::from_str(line).map_err(|source| ParseError { line: at + 1, source })
            })
            .collect::<Result<_, _>>()?;
        Ok(History { records })
    }

    pub fn to_text(&self) -> String {
        let line = |record: &Record| serde_json::to_string(record).expect("plain data") + "\n";
        self.records.iter().map(line).collect()
    }
}
