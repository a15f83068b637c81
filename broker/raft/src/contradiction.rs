//! Whether what a leader sends contradicts what is committed here.
//!
//! In a group that keeps what it promises it never does. Topics that acknowledge from memory promise less: replicas lose the
//! ends of their logs with the power, elect one of them, and go on; one that was not there has committed entries of which the
//! others know nothing. Raft itself never looks at such entries. It answers with its own commit index, by which the leader
//! would count it among those that have its entries, and never sends it others. So what comes is compared first, by terms,
//! and no answer says more than was compared.
//!
//! Pure: terms in, a verdict out. What becomes of the replica is its shell's to decide (`Group::begin_over`).

/// What a leader has in the place of what is committed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contradiction {
    pub leader_id: u64,
    pub term: u64,
    /// The logs are known to agree up to here; `None`: nothing is known of where they do.
    pub agreed_index: Option<u64>,
    /// What is committed here reaches to this.
    pub committed_index: u64,
}

/// The log here, up to what is committed.
pub(crate) struct Own<'a> {
    pub before: (u64, u64),
    pub committed: (u64, u64),
    /// Of an index from `before` to the commit index.
    pub term_of: &'a dyn Fn(u64) -> u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Raft's own answer is true.
    Agrees,
    /// It agrees as far as it goes, which is less than what is committed here.
    AgreesUpTo(u64),
    /// The entry that it follows on is another one here. They may agree up to this index, of this term.
    MayAgreeUpTo { index: u64, term: u64 },
    /// From `first` on, or before it, the leader has other entries.
    Contradicts { first: u64, agreed_index: Option<u64> },
}

impl Own<'_> {
    /// Terms never fall along a log: that says enough of entries that are not there any more, or not yet.
    fn may_be(&self, index: u64, term: u64) -> bool {
        if index < self.before.0 {
            term <= self.before.1
        } else if index <= self.committed.0 {
            term == (self.term_of)(index)
        } else {
            term >= self.committed.1
        }
    }

    /// Entries of these terms, the first of which follows on `prev`.
    pub fn judge_entries(&self, prev: (u64, u64), terms: impl Iterator<Item = u64>) -> Verdict {
        if !self.may_be(prev.0, prev.1) {
            let mut index = prev.0.min(self.committed.0);
            while index >= self.before.0 {
                let term = (self.term_of)(index);
                if term <= prev.1 {
                    // Where it is not among what is committed here, Raft's own answer says the same.
                    return match prev.0 < self.committed.0 {
                        true => Verdict::MayAgreeUpTo { index, term },
                        false => Verdict::Agrees,
                    };
                }
                if index == 0 {
                    break;
                }
                index -= 1;
            }
            return Verdict::Contradicts { first: self.before.0, agreed_index: None };
        }
        let mut last = prev.0;
        for term in terms {
            if last >= self.committed.0 {
                break;
            }
            if !self.may_be(last + 1, term) {
                let agreed_index = (last >= self.before.0).then_some(last);
                return Verdict::Contradicts { first: last + 1, agreed_index };
            }
            last += 1;
        }
        if last < self.committed.0 { Verdict::AgreesUpTo(last) } else { Verdict::Agrees }
    }

    /// The place where the leader's log begins.
    pub fn judge_beginning(&self, index: u64, term: u64) -> Verdict {
        if !self.may_be(index, term) && index <= self.committed.0 {
            return Verdict::Contradicts { first: index, agreed_index: None };
        }
        if index < self.committed.0 { Verdict::AgreesUpTo(index) } else { Verdict::Agrees }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries 4 to 9 of terms 2, 2, 2, 3, 3, 3, after one of term 2; all committed.
    fn judge(prev: (u64, u64), terms: &[u64]) -> Verdict {
        let term_of = |index: u64| if index <= 6 { 2 } else { 3 };
        let own = Own { before: (3, 2), committed: (9, 3), term_of: &term_of };
        own.judge_entries(prev, terms.iter().copied())
    }

    #[test]
    fn what_is_the_same_agrees_as_far_as_it_goes() {
        assert_eq!(judge((9, 3), &[3, 4]), Verdict::Agrees);
        assert_eq!(judge((8, 3), &[3, 4]), Verdict::Agrees);
        assert_eq!(judge((12, 3), &[4]), Verdict::Agrees);
        assert_eq!(judge((6, 2), &[3]), Verdict::AgreesUpTo(7));
        assert_eq!(judge((6, 2), &[]), Verdict::AgreesUpTo(6));
        // Gone from the front of the log.
        assert_eq!(judge((1, 1), &[2]), Verdict::AgreesUpTo(2));
        assert_eq!(judge((1, 1), &[2, 2, 2]), Verdict::AgreesUpTo(4));
    }

    #[test]
    fn an_entry_that_is_another_contradicts_from_there_on() {
        assert_eq!(judge((6, 2), &[5]), Verdict::Contradicts { first: 7, agreed_index: Some(6) });
        assert_eq!(judge((4, 2), &[2, 3]), Verdict::Contradicts { first: 6, agreed_index: Some(5) });
        assert_eq!(judge((1, 1), &[3]), Verdict::Contradicts { first: 2, agreed_index: None });
        assert_eq!(judge((1, 1), &[1, 1]), Verdict::Contradicts { first: 3, agreed_index: None });
        // Committed ones are never replaced by what comes behind.
        assert_eq!(judge((9, 3), &[5]), Verdict::Agrees);
    }

    #[test]
    fn a_leader_that_follows_on_another_entry_is_asked_for_older_ones_while_there_are_any() {
        assert_eq!(judge((8, 4), &[4]), Verdict::MayAgreeUpTo { index: 8, term: 3 });
        assert_eq!(judge((8, 2), &[4]), Verdict::MayAgreeUpTo { index: 6, term: 2 });
        // Raft itself says so.
        assert_eq!(judge((12, 2), &[4]), Verdict::Agrees);
        // Nothing here is as old as that.
        for prev in [(12, 1), (9, 1), (5, 1), (3, 1)] {
            assert_eq!(judge(prev, &[4]), Verdict::Contradicts { first: 3, agreed_index: None });
        }
    }

    #[test]
    fn a_beginning_is_an_entry_like_others() {
        let term_of = |index: u64| if index <= 6 { 2 } else { 3 };
        let own = Own { before: (3, 2), committed: (9, 3), term_of: &term_of };
        assert_eq!(own.judge_beginning(9, 3), Verdict::Agrees);
        assert_eq!(own.judge_beginning(50, 5), Verdict::Agrees);
        assert_eq!(own.judge_beginning(50, 1), Verdict::Agrees);
        assert_eq!(own.judge_beginning(7, 3), Verdict::AgreesUpTo(7));
        for (index, term) in [(9, 4), (7, 2), (2, 3)] {
            let contradicts = Verdict::Contradicts { first: index, agreed_index: None };
            assert_eq!(own.judge_beginning(index, term), contradicts);
        }
    }
}
