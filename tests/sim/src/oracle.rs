//! What must hold at every moment of a run, known to nobody who takes part.

use std::collections::BTreeMap;

use flumen_raft::{Body, Entry, Message};

#[derive(Default)]
pub(crate) struct Oracle {
    leaders: BTreeMap<(u64, u64), u64>,
    votes: BTreeMap<(u64, u64, u64), u64>,
    committed: BTreeMap<(u64, u64), Entry>,
    failure: Option<String>,
    pub elections: u64,
    pub commits: u64,
}

impl Oracle {
    pub fn fail(&mut self, what: String) {
        self.failure.get_or_insert(what);
    }

    pub fn failure(&self) -> Option<&String> {
        self.failure.as_ref()
    }

    pub fn leads(&mut self, group: u64, term: u64, node: u64) {
        let mut new = false;
        let leader = *self.leaders.entry((group, term)).or_insert_with(|| {
            new = true;
            node
        });
        self.elections += u64::from(new);
        if leader != node {
            self.fail(format!("group {group}: {leader} and {node} both lead term {term}"));
        }
    }

    /// A vote that left its node.
    pub fn sends(&mut self, group: u64, message: &Message) {
        if let Body::VoteAnswer { pre: false, granted: true, .. } = message.body {
            let to = *self.votes.entry((group, message.from, message.term)).or_insert(message.to);
            if to != message.to {
                let (from, term) = (message.from, message.term);
                self.fail(format!("group {group}: {from} voted for {to} and {} in term {term}", message.to));
            }
        }
    }

    pub fn commits(&mut self, group: u64, node: u64, entry: &Entry) {
        let known = self.committed.entry((group, entry.index)).or_insert_with(|| {
            self.commits += 1;
            entry.clone()
        });
        if known != entry {
            let what = format!(
                "group {group}: {node} committed term {} at index {}, where term {} was committed",
                entry.term, entry.index, known.term
            );
            self.fail(what);
        }
    }
}
