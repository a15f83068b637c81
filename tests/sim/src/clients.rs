//! Clients: each produces to, reads and asks about one group, one request at a time, and writes the history.

use flumen_checker::{Event, Outcome};

use crate::broker::Broker;
use crate::mutant::DriverMutant;
use crate::network::Time;
use crate::replica::{Waiting, batch};
use crate::world::{Ev, World};

const PATIENCE_US: Time = 400_000;
const POLL_RECORDS: usize = 20;
/// Operations of a request's records are numbered `op * RECORDS_MAX + n`.
const RECORDS_MAX: u64 = 4;

pub(crate) struct Client {
    pub group: usize,
    pub current: Option<(u64, Asked)>,
    leader: u64,
    position: i64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Asked {
    Append { value: u64, count: u32 },
    Poll { from: i64 },
    End,
}

#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Appended(i64),
    Records {
        records: Vec<(i64, u64)>,
        log_start: i64,
        high_watermark: i64,
        epoch: i32,
    },
    End(i64),
    /// With the leader, if known.
    NotLeader(u64),
}

impl Client {
    pub fn new(group: usize) -> Client {
        Client { group, current: None, leader: 1, position: 0 }
    }
}

pub(crate) fn partition(group: usize) -> String {
    format!("t-{group}")
}

impl World {
    pub(crate) fn note(&mut self, event: Event) {
        let at_ms = self.now / 1000;
        self.history.push(at_ms, event);
    }

    pub(crate) fn client_begins(&mut self, client: usize) {
        if self.clients_stop || self.clients[client].current.is_some() {
            return;
        }
        let op = self.next_op;
        self.next_op += 1;
        let group = self.clients[client].group;
        let asked = match self.rng.below(10) {
            0..=5 => Asked::Append { value: op * RECORDS_MAX, count: self.rng.between(1, 3) as u32 },
            6..=7 => Asked::Poll { from: self.clients[client].position },
            _ => Asked::End,
        };
        match asked {
            Asked::Append { value, count } => {
                for n in 0..u64::from(count) {
                    self.note(Event::Send {
                        op: op * RECORDS_MAX + n,
                        producer: client as u64,
                        epoch: 0,
                        partition: partition(group),
                        value: value + n,
                        txn: None,
                    });
                }
            }
            Asked::End => self.note(Event::AskEnd { op, partition: partition(group) }),
            Asked::Poll { .. } => {}
        }
        self.clients[client].current = Some((op, asked));
        let leader = self.clients[client].leader;
        let node = if self.rng.permille(100) { self.rng.pick(&self.nodes) } else { leader };
        let at = self.now + self.rng.between(100, 1_500);
        self.at(at, Ev::Request { node, client, op, asked });
        self.at(self.now + PATIENCE_US, Ev::GiveUp { client, op });
    }

    pub(crate) fn reply(&mut self, client: usize, op: u64, answer: Answer) {
        let at = self.now + self.rng.between(100, 1_500);
        self.at(at, Ev::Reply { client, op, answer });
    }

    /// A request reaches a broker. One whose client has given up does not: the connection is closed.
    pub(crate) fn request(&mut self, broker: &mut Broker, client: usize, op: u64, asked: Asked) {
        if self.clients[client].current.is_none_or(|(current, _)| current != op) {
            return;
        }
        let slot = self.clients[client].group;
        let Some(process) = &mut broker.process else {
            return self.reply(client, op, Answer::NotLeader(0));
        };
        let replica = &mut process.replicas[slot];
        if !replica.group.may_serve() {
            let leader = replica.group.leader_id();
            return self.reply(client, op, Answer::NotLeader(leader));
        }
        match asked {
            Asked::Append { value, count } => {
                let base = replica.next_offset;
                let accepted = replica.group.propose(batch(base, value, count));
                if accepted.is_ok() || self.mutant == Some(DriverMutant::MovesOffsetWhenRefused) {
                    replica.next_offset = base + i64::from(count);
                }
                match accepted {
                    Ok((index, term)) => {
                        replica.waiting.push_back(Waiting { index, term, client, op, base });
                        if self.mutant == Some(DriverMutant::AcknowledgesProposals) {
                            self.reply(client, op, Answer::Appended(base));
                        }
                    }
                    Err(_) => self.reply(client, op, Answer::NotLeader(0)),
                }
            }
            Asked::Poll { from } => {
                let uncommitted = self.mutant == Some(DriverMutant::ServesUncommitted);
                let upper = if uncommitted { replica.log_end() } else { replica.high_watermark };
                let from = from.max(replica.start_offset);
                let answer = Answer::Records {
                    records: replica.records(from, upper, POLL_RECORDS),
                    log_start: replica.start_offset,
                    high_watermark: upper,
                    epoch: replica.group.leader_epoch(),
                };
                self.reply(client, op, answer);
            }
            Asked::End if self.mutant == Some(DriverMutant::ReadsWithoutConfirming) => {
                let end = replica.high_watermark;
                self.reply(client, op, Answer::End(end));
            }
            Asked::End => match replica.group.confirm_read() {
                Ok(token) => replica.asked.push((token, client, op)),
                Err(_) => self.reply(client, op, Answer::NotLeader(0)),
            },
        }
        self.work(broker, slot);
    }

    pub(crate) fn answered(&mut self, client: usize, op: u64, answer: Answer) {
        let Some((current, asked)) = self.clients[client].current else { return };
        if current != op {
            return;
        }
        self.clients[client].current = None;
        let name = partition(self.clients[client].group);
        match (asked, answer) {
            (Asked::Append { count, .. }, Answer::Appended(base)) => {
                self.acknowledged += 1;
                for n in 0..u64::from(count) {
                    let (op, offset) = (op * RECORDS_MAX + n, Some(base + n as i64));
                    self.note(Event::Sent { op, outcome: Outcome::Ok, offset });
                }
            }
            (_, Answer::Records { records, log_start, high_watermark, epoch }) => {
                let seek = self.clients[client].position < log_start;
                let last = records.last().map(|(offset, _)| offset + 1);
                self.clients[client].position = last.unwrap_or(self.clients[client].position.max(log_start));
                self.note(Event::Watermarks {
                    observer: client as u64,
                    partition: name.clone(),
                    leader_epoch: epoch,
                    high_watermark,
                    last_stable: high_watermark,
                });
                self.note(Event::Poll {
                    consumer: client as u64,
                    partition: name,
                    records,
                    committed_only: true,
                    seek,
                    txn: None,
                });
            }
            (_, Answer::End(offset)) => self.note(Event::End { op, offset }),
            (asked, Answer::NotLeader(leader)) => {
                self.clients[client].leader = if leader == 0 { self.rng.pick(&self.nodes) } else { leader };
                self.ended_without(op, asked, Outcome::Failed);
            }
            (_, Answer::Appended(_)) => {}
        }
        let pause = self.rng.between(200, 8_000);
        self.at(self.now + pause, Ev::Client(client));
    }

    pub(crate) fn gives_up(&mut self, client: usize, op: u64) {
        let Some((current, asked)) = self.clients[client].current else { return };
        if current != op {
            return;
        }
        self.clients[client].current = None;
        self.clients[client].leader = self.rng.pick(&self.nodes);
        self.ended_without(op, asked, Outcome::Unknown);
        self.at(self.now + 1_000, Ev::Client(client));
    }

    fn ended_without(&mut self, op: u64, asked: Asked, outcome: Outcome) {
        if let Asked::Append { count, .. } = asked {
            for n in 0..u64::from(count) {
                self.note(Event::Sent { op: op * RECORDS_MAX + n, outcome, offset: None });
            }
        }
    }
}
