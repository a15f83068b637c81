//! How one plan gets into the table exactly once, whatever happens to the insert.
//!
//! Owns the classification of failures (`classify`) and the delivery machine: the exporter feeds it what happened and
//! does what it says. Pure, no clock, no I/O. Invariants: an insert is repeated under the same token only where
//! ClickHouse can recognise the repetition; rows are inserted under another token only if a read-back, made after the
//! earlier insert was gone from the server, did not find them; more rows than planned stop the export, nothing is
//! deleted. It does not decide when to try again (`breaker`).

pub mod classify;
#[cfg(test)]
mod tests;

pub use classify::{Class, Failure, classify, hint};

use serde::Serialize;

use crate::plan::Plan;

/// Inserts of missing rows per plan until the export stops and asks. Each is needed only if the server lost or refused
/// the one before.
pub const MAX_REPAIRS: u32 = 20;
/// Two readings of a server's start (its clock minus its uptime, both cut to seconds) differ by at most this much.
pub const START_JITTER_S: i64 = 1;

/// What the table and the delivery allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Rows can be found again by `_partition` and `_offset`, and must be: exactly-once.
    pub read_back: bool,
    /// The table remembers tokens.
    pub deduplicates: bool,
    /// Tokens commit together with parts (Replicated and Shared engines), so a resend is right at any time.
    pub token_commits_with_part: bool,
    /// Materialized views hang on the table: a resend heals those that failed.
    pub has_views: bool,
}

/// What a read-back found in one range of the plan, in the order of the plan's ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub rows: u64,
    /// Distinct offsets.
    pub offsets: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The server acknowledged completely.
    Acknowledged,
    Failed(Class),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The plan was just recorded; nothing was sent.
    Fresh,
    /// The plan was found open, or is tried again after a failure: an insert may have happened or be on its way.
    Resume,
    DeadLettersWritten,
    /// The insert ended so. `server_started_s` is the server's start as read before it was sent.
    Sent(Sent),
    /// No insert of this plan is running on the server.
    Quiet,
    /// Read back on the server that was sent to, with its start as read at the same time.
    Found {
        found: Vec<Found>,
        server_started_s: i64,
    },
    /// The missing rows were inserted; the machine looks again.
    Repaired(Sent),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Alarm {
    /// The table holds more rows of the range than there are records.
    DuplicatesDetected,
    /// Rows keep vanishing after acknowledged inserts.
    RepairsExhausted,
    /// The block encoded again from the log is not the one that was planned.
    BlockChanged,
    /// The server refused single rows until there were too many of them.
    TooManyRejected,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    WriteDeadLetters,
    /// Insert the whole block under the plan's token.
    Send,
    /// Wait until no insert with the plan's token, or one derived from it, runs on the server; if the plan must look
    /// first, no insert of the topic at all. Never kill it.
    AwaitQuiet,
    ReadBack,
    /// List the offsets that are present, then insert the others under a repair token (`repair_number`).
    Repair,
    /// Replace the plan by halves, or its single row by a dead letter.
    Split(Class),
    /// Record that the plan is settled.
    Settle,
    /// Try again later with `Event::Resume`.
    BackOff(Class),
    Alarm(Alarm),
}

/// The number in the token of an insert of missing rows. `last` and `last_crc` are what was recorded, `acknowledged` the
/// number that the server last acknowledged to this process. The same rows go under the same token as long as that
/// attempt's outcome is not known, so that its late arrival is recognised; other rows, or the same rows lost again, get
/// a token of their own.
pub fn repair_number(last: u32, last_crc: u32, block_crc: u32, acknowledged: Option<u32>) -> u32 {
    if last > 0 && last_crc == block_crc && acknowledged != Some(last) {
        last
    } else {
        last.saturating_add(1)
    }
}

#[derive(Clone, Debug)]
pub struct Delivery {
    traits: Traits,
    rows: Vec<u64>,
    dead_letters_due: bool,
    look_first: bool,
    /// What to do once the dead letters are written.
    fresh: bool,
    /// An insert under the plan's token was acknowledged after a read-back asked for it.
    resent: bool,
    /// The next acknowledgement settles without a look: nothing but this first insert was ever sent.
    untouched: bool,
    repairs: u32,
    sent_to_start_s: i64,
    /// The server refused the block for this; nothing of it may be in the table.
    refused: Option<Class>,
}

impl Delivery {
    pub fn new(plan: &Plan, dead_letters_written: bool, repairs: u32, traits: Traits) -> Delivery {
        Delivery {
            traits,
            rows: plan.ranges.iter().map(|range| range.rows).collect(),
            dead_letters_due: plan.dead_letters > 0 && !dead_letters_written,
            look_first: plan.look_first && traits.read_back,
            fresh: false,
            resent: false,
            untouched: false,
            repairs,
            sent_to_start_s: plan.server_started_s,
            refused: None,
        }
    }

    /// Tells the machine which server the next insert goes to.
    pub fn sending_to(&mut self, server_started_s: i64) {
        self.sent_to_start_s = server_started_s;
    }

    pub fn step(&mut self, event: Event) -> Action {
        match event {
            Event::Fresh => {
                self.fresh = true;
                self.begin()
            }
            Event::Resume => {
                self.fresh = false;
                self.begin()
            }
            Event::DeadLettersWritten => {
                self.dead_letters_due = false;
                self.begin()
            }
            Event::Sent(Sent::Acknowledged) => {
                if self.untouched || !self.traits.read_back {
                    return Action::Settle;
                }
                self.resent = true;
                Action::ReadBack
            }
            Event::Sent(Sent::Failed(class)) => self.failed(class),
            Event::Quiet => Action::ReadBack,
            Event::Found { found, server_started_s } => self.found(&found, server_started_s),
            Event::Repaired(Sent::Acknowledged) => Action::ReadBack,
            Event::Repaired(Sent::Failed(class)) => Action::BackOff(class),
        }
    }

    fn begin(&mut self) -> Action {
        if self.dead_letters_due {
            return Action::WriteDeadLetters;
        }
        if self.rows.iter().all(|rows| *rows == 0) {
            return Action::Settle;
        }
        self.untouched = self.fresh && !self.look_first;
        match (self.untouched, self.traits.read_back) {
            (true, _) | (_, false) => Action::Send,
            // Rows of an earlier epoch may be there, or on their way.
            (false, true) => Action::AwaitQuiet,
        }
    }

    fn failed(&mut self, class: Class) -> Action {
        self.untouched = false;
        let refused = matches!(class, Class::Resource | Class::BatchShape | Class::BadRows);
        if !refused {
            return Action::BackOff(class);
        }
        if !self.traits.read_back {
            return Action::Split(class);
        }
        // The server said no to the whole block. Believed only after a look.
        self.refused = Some(class);
        Action::AwaitQuiet
    }

    fn found(&mut self, found: &[Found], server_started_s: i64) -> Action {
        let surplus = found.iter().zip(&self.rows).any(|(f, rows)| f.rows > *rows || f.rows != f.offsets);
        if surplus {
            return Action::Alarm(Alarm::DuplicatesDetected);
        }
        let refused = self.refused.take();
        let present: u64 = found.iter().map(|f| f.rows).sum();
        let complete =
            found.len() == self.rows.len() && found.iter().zip(&self.rows).all(|(f, rows)| f.rows == *rows);
        if complete {
            // The rows are there, but a view's insert may have failed after the table's. Only where a token is
            // never wrong may it be sent again to find out.
            let heal = self.traits.has_views && self.traits.token_commits_with_part;
            if heal && !self.resent && !self.look_first {
                return self.send();
            }
            return Action::Settle;
        }
        if let (Some(class), 0) = (refused, present) {
            return Action::Split(class);
        }
        let same_server = self.sent_to_start_s != 0
            && server_started_s != 0
            && (server_started_s - self.sent_to_start_s).abs() <= START_JITTER_S;
        let token_is_right = self.traits.token_commits_with_part || same_server;
        // With nothing in the table a resend cannot double anything; with something in it, only a token that is
        // certain to be remembered protects those rows.
        let resend = !self.resent
            && self.traits.deduplicates
            && !(self.look_first && present > 0)
            && (present == 0 || token_is_right);
        if resend {
            return self.send();
        }
        if self.repairs >= MAX_REPAIRS {
            return Action::Alarm(Alarm::RepairsExhausted);
        }
        self.repairs += 1;
        Action::Repair
    }

    fn send(&mut self) -> Action {
        self.untouched = false;
        Action::Send
    }
}
