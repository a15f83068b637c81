//! A history by what it is about, as the checks need it.

use std::collections::BTreeMap;

use crate::history::{Event, History, Outcome};

pub(crate) struct Send<'a> {
    pub place: usize,
    pub at_ms: u64,
    pub op: u64,
    pub producer: u64,
    pub epoch: i32,
    pub partition: &'a str,
    pub value: u64,
    pub txn: Option<u64>,
    /// `None`: the history ends before.
    pub outcome: Option<(usize, Outcome, Option<i64>)>,
    pub ended_ms: Option<u64>,
}

impl Send<'_> {
    pub fn offset(&self) -> Option<i64> {
        self.outcome.and_then(|(_, outcome, offset)| offset.filter(|_| outcome == Outcome::Ok))
    }

    pub fn failed(&self) -> bool {
        matches!(self.outcome, Some((_, Outcome::Failed, _)))
    }
}

pub(crate) struct Poll<'a> {
    pub place: usize,
    pub consumer: u64,
    pub partition: &'a str,
    pub records: &'a [(i64, u64)],
    pub committed_only: bool,
    pub seek: bool,
    pub txn: Option<u64>,
}

pub(crate) struct Final<'a> {
    pub log_start: i64,
    pub records: &'a [(i64, u64)],
    pub committed: &'a [u64],
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Txn {
    /// Where a commit was asked for.
    pub commit_asked: Option<usize>,
    pub abort_asked: bool,
    pub outcome: Option<Outcome>,
}

impl Txn {
    pub fn committed(&self) -> bool {
        self.commit_asked.is_some() && self.outcome == Some(Outcome::Ok)
    }

    /// No reader may ever see it.
    pub fn aborted(&self) -> bool {
        match self.commit_asked {
            None => self.abort_asked,
            Some(_) => self.outcome == Some(Outcome::Failed),
        }
    }
}

pub(crate) struct Index<'a> {
    pub history: &'a History,
    pub sends: Vec<Send<'a>>,
    pub by_value: BTreeMap<u64, usize>,
    pub polls: Vec<Poll<'a>>,
    pub finals: BTreeMap<&'a str, Final<'a>>,
    pub txns: BTreeMap<u64, Txn>,
}

impl<'a> Index<'a> {
    pub fn of(history: &'a History) -> Index<'a> {
        let mut index = Index {
            history,
            sends: Vec::new(),
            by_value: BTreeMap::new(),
            polls: Vec::new(),
            finals: BTreeMap::new(),
            txns: BTreeMap::new(),
        };
        let mut by_op = BTreeMap::new();
        for (place, record) in history.records.iter().enumerate() {
            match &record.event {
                Event::Send { op, producer, epoch, partition, value, txn } => {
                    by_op.insert(*op, index.sends.len());
                    index.by_value.insert(*value, index.sends.len());
                    index.sends.push(Send {
                        place,
                        at_ms: record.at_ms,
                        op: *op,
                        producer: *producer,
                        epoch: *epoch,
                        partition,
                        value: *value,
                        txn: *txn,
                        outcome: None,
                        ended_ms: None,
                    });
                    if let Some(txn) = txn {
                        index.txns.entry(*txn).or_default();
                    }
                }
                Event::Sent { op, outcome, offset } => {
                    if let Some(at) = by_op.get(op) {
                        index.sends[*at].outcome = Some((place, *outcome, *offset));
                        index.sends[*at].ended_ms = Some(record.at_ms);
                    }
                }
                Event::TxnEnd { txn, commit } => {
                    let state = index.txns.entry(*txn).or_default();
                    if *commit {
                        state.commit_asked = Some(place);
                    } else {
                        state.abort_asked = true;
                    }
                }
                Event::TxnEnded { txn, outcome } => {
                    index.txns.entry(*txn).or_default().outcome = Some(*outcome);
                }
                Event::Poll { consumer, partition, records, committed_only, seek, txn } => {
                    index.polls.push(Poll {
                        place,
                        consumer: *consumer,
                        partition,
                        records,
                        committed_only: *committed_only,
                        seek: *seek,
                        txn: *txn,
                    });
                }
                Event::FinalRead { partition, log_start, records, committed } => {
                    index.finals.insert(partition, Final { log_start: *log_start, records, committed });
                }
                _ => {}
            }
        }
        index
    }

    pub fn send_of(&self, value: u64) -> Option<&Send<'a>> {
        self.by_value.get(&value).map(|at| &self.sends[*at])
    }

    /// Everything that anybody was told about what lies where: partition, offset, value, by whom.
    pub fn sightings(&self) -> Vec<(&'a str, i64, u64, String)> {
        let mut all = Vec::new();
        for send in &self.sends {
            if let Some(offset) = send.offset() {
                all.push((send.partition, offset, send.value, format!("send {}", send.op)));
            }
        }
        for poll in &self.polls {
            for (offset, value) in poll.records {
                all.push((poll.partition, *offset, *value, format!("consumer {}", poll.consumer)));
            }
        }
        for (partition, last) in &self.finals {
            for (offset, value) in last.records {
                all.push((partition, *offset, *value, "the final read".to_owned()));
            }
        }
        all
    }
}
