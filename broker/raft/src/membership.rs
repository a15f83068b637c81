//! Who votes in a group, and who only listens.
//!
//! A change names the whole membership that is wanted (`Target`), not steps towards it: every replica works out the steps
//! from the membership that it has when the entry is applied, which is the same on all of them.
//! The bytes here are our own. Raft's protobuf never leaves the process.

use bytes::{BufMut, Bytes, BytesMut};
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};

/// Members of one kind in a group. Kafka installations use 3 to 5 replicas; bytes from elsewhere may claim anything.
pub const MEMBERS_MAX: usize = 32;

const VERSION: u8 = 1;
/// Of what a replica stores that begins at nothing.
const STORED_WITH_TERM: u8 = 2;
const LEAVE: u8 = 0;
const TARGET: u8 = 1;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    pub voters: Vec<u64>,
    pub learners: Vec<u64>,
    /// The voters before a change that is under way; while there are any, a majority of them is needed too.
    pub outgoing: Vec<u64>,
    /// Voters that become learners when the change is complete.
    pub learners_next: Vec<u64>,
    pub auto_leave: bool,
}

/// What a change asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub voters: Vec<u64>,
    pub learners: Vec<u64>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MembershipError {
    #[error("a group needs at least one voter")]
    NoVoter,
    #[error("more than {MEMBERS_MAX} members of one kind")]
    TooMany,
    #[error("member id 0, or one id twice")]
    BadId,
    #[error("bytes that are no membership")]
    Malformed,
}

impl Membership {
    pub fn of_voters(voters: impl Into<Vec<u64>>) -> Membership {
        Membership { voters: voters.into(), ..Membership::default() }
    }

    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    pub fn is_voter(&self, id: u64) -> bool {
        self.voters.contains(&id) || self.outgoing.contains(&id)
    }

    pub fn contains(&self, id: u64) -> bool {
        self.is_voter(id) || self.learners.contains(&id) || self.learners_next.contains(&id)
    }

    /// Nobody else's vote counts.
    pub fn is_alone(&self, id: u64) -> bool {
        self.voters == [id] && self.outgoing.is_empty()
    }

    /// There is nobody else, not even a learner.
    pub fn has_only(&self, id: u64) -> bool {
        self.is_alone(id) && self.learners.is_empty() && self.learners_next.is_empty()
    }

    /// Everybody but `id`, each once.
    pub fn others(&self, id: u64) -> Vec<u64> {
        let mut all: Vec<u64> = [&self.voters, &self.outgoing, &self.learners, &self.learners_next]
            .into_iter()
            .flatten()
            .copied()
            .filter(|other| *other != id)
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    pub fn check(&self) -> Result<(), MembershipError> {
        if self.voters.is_empty() {
            return Err(MembershipError::NoVoter);
        }
        for ids in [&self.voters, &self.learners, &self.outgoing, &self.learners_next] {
            check_ids(ids)?;
        }
        let voter = |id: &u64| self.is_voter(*id);
        let demoted = |id: &u64| self.outgoing.contains(id) && !self.voters.contains(id);
        if self.learners.iter().any(voter)
            || !self.learners_next.iter().all(demoted)
            || (self.outgoing.is_empty() && self.auto_leave)
        {
            return Err(MembershipError::BadId);
        }
        Ok(())
    }

    pub(crate) fn to_conf_state(&self) -> ConfState {
        ConfState {
            voters: self.voters.clone(),
            learners: self.learners.clone(),
            voters_outgoing: self.outgoing.clone(),
            learners_next: self.learners_next.clone(),
            auto_leave: self.auto_leave,
            ..ConfState::default()
        }
    }

    pub(crate) fn from_conf_state(state: &ConfState) -> Membership {
        let sorted = |ids: &[u64]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        Membership {
            voters: sorted(&state.voters),
            learners: sorted(&state.learners),
            outgoing: sorted(&state.voters_outgoing),
            learners_next: sorted(&state.learners_next),
            auto_leave: state.auto_leave,
        }
    }

    /// version u8, auto_leave u8, then four times: count u8, ids u64 little endian.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(VERSION);
        out.put_u8(u8::from(self.auto_leave));
        for ids in [&self.voters, &self.learners, &self.outgoing, &self.learners_next] {
            put_ids(&mut out, ids);
        }
        out.freeze()
    }

    /// As a replica stores it: with the term below which it abstains (`GroupStart::abstains_below`), if there is one.
    /// Version 2: version u8, term u64 little endian, then as `encode`.
    pub fn encode_stored(&self, abstains_below: u64) -> Bytes {
        if abstains_below == 0 {
            return self.encode();
        }
        let mut out = BytesMut::new();
        out.put_u8(STORED_WITH_TERM);
        out.put_u64_le(abstains_below);
        out.put_slice(&self.encode());
        out.freeze()
    }

    /// The membership, and the term below which the replica abstains (0: it does not).
    pub fn decode_stored(bytes: &[u8]) -> Result<(Membership, u64), MembershipError> {
        let [STORED_WITH_TERM, rest @ ..] = bytes else { return Ok((Membership::decode(bytes)?, 0)) };
        let (term, rest) = rest.split_first_chunk::<8>().ok_or(MembershipError::Malformed)?;
        Ok((Membership::decode(rest)?, u64::from_le_bytes(*term)))
    }

    pub fn decode(bytes: &[u8]) -> Result<Membership, MembershipError> {
        let [VERSION, auto_leave @ 0..=1, rest @ ..] = bytes else { return Err(MembershipError::Malformed) };
        let mut rest = rest;
        let membership = Membership {
            voters: take_ids(&mut rest)?,
            learners: take_ids(&mut rest)?,
            outgoing: take_ids(&mut rest)?,
            learners_next: take_ids(&mut rest)?,
            auto_leave: *auto_leave == 1,
        };
        if !rest.is_empty() {
            return Err(MembershipError::Malformed);
        }
        membership.check()?;
        Ok(membership)
    }
}

impl Target {
    pub fn check(&self) -> Result<(), MembershipError> {
        let as_membership = Membership {
            voters: self.voters.clone(),
            learners: self.learners.clone(),
            ..Membership::default()
        };
        as_membership.check()
    }

    /// version u8, kind u8, then twice: count u8, ids u64 little endian.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(VERSION);
        out.put_u8(TARGET);
        put_ids(&mut out, &self.voters);
        put_ids(&mut out, &self.learners);
        out.freeze()
    }
}

/// What a membership entry of the log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The change under way is complete: the outgoing voters go.
    Leave,
    Target(Target),
}

impl Change {
    pub(crate) fn leave_bytes() -> Bytes {
        Bytes::from_static(&[VERSION, LEAVE])
    }

    /// Empty bytes are what Raft itself writes to complete a change.
    pub fn decode(bytes: &[u8]) -> Result<Change, MembershipError> {
        match bytes {
            [] | [VERSION, LEAVE] => Ok(Change::Leave),
            [VERSION, TARGET, rest @ ..] => {
                let mut rest = rest;
                let target = Target { voters: take_ids(&mut rest)?, learners: take_ids(&mut rest)? };
                if !rest.is_empty() {
                    return Err(MembershipError::Malformed);
                }
                target.check()?;
                Ok(Change::Target(target))
            }
            _ => Err(MembershipError::Malformed),
        }
    }

    /// The steps from `now`; `None` when there are none. (Raft takes a change without steps for `Leave`.)
    pub(crate) fn steps_from(&self, now: &Membership) -> Option<ConfChangeV2> {
        let mut steps = ConfChangeV2::default();
        let Change::Target(target) = self else { return now.is_joint().then_some(steps) };
        let mut step = |id: u64, kind: ConfChangeType| {
            let mut single = ConfChangeSingle { node_id: id, ..ConfChangeSingle::default() };
            single.set_change_type(kind);
            steps.mut_changes().push(single);
        };
        for id in &target.voters {
            if !now.voters.contains(id) {
                step(*id, ConfChangeType::AddNode);
            }
        }
        for id in &target.learners {
            if !now.learners.contains(id) {
                step(*id, ConfChangeType::AddLearnerNode);
            }
        }
        for id in now.voters.iter().chain(&now.learners) {
            if !target.voters.contains(id) && !target.learners.contains(id) {
                step(*id, ConfChangeType::RemoveNode);
            }
        }
        (!steps.changes.is_empty()).then_some(steps)
    }
}

fn check_ids(ids: &[u64]) -> Result<(), MembershipError> {
    if ids.len() > MEMBERS_MAX {
        return Err(MembershipError::TooMany);
    }
    let bad = |(at, id): (usize, &u64)| *id == 0 || ids[..at].contains(id);
    if ids.iter().enumerate().any(bad) { Err(MembershipError::BadId) } else { Ok(()) }
}

fn put_ids(out: &mut BytesMut, ids: &[u64]) {
    out.put_u8(u8::try_from(ids.len()).expect("checked against MEMBERS_MAX"));
    for id in ids {
        out.put_u64_le(*id);
    }
}

fn take_ids(rest: &mut &[u8]) -> Result<Vec<u64>, MembershipError> {
    let (count, after) = rest.split_first().ok_or(MembershipError::Malformed)?;
    let count = usize::from(*count);
    if count > MEMBERS_MAX {
        return Err(MembershipError::TooMany);
    }
    let (ids, after) = after.split_at_checked(count * 8).ok_or(MembershipError::Malformed)?;
    *rest = after;
    Ok(ids.chunks_exact(8).map(|id| u64::from_le_bytes(id.try_into().expect("eight bytes"))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_they_were_and_their_form_is_fixed() {
        let membership = Membership {
            voters: vec![1, 2, 3],
            learners: vec![4],
            outgoing: vec![1, 2, 5],
            learners_next: vec![5],
            auto_leave: true,
        };
        for term in [0, 7] {
            let stored = membership.encode_stored(term);
            assert_eq!(Membership::decode_stored(&stored), Ok((membership.clone(), term)));
            assert!((0..stored.len()).all(|end| Membership::decode_stored(&stored[..end]).is_err()));
        }
        assert!(Membership::decode(&membership.encode_stored(7)).is_err());
        assert_eq!(Membership::decode(&membership.encode()), Ok(membership));
        let target = Target { voters: vec![7], learners: vec![] };
        assert_eq!(&target.encode()[..], [1, 1, 1, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Change::decode(&target.encode()), Ok(Change::Target(target)));
        assert_eq!(Change::decode(&[]), Ok(Change::Leave));
    }

    #[test]
    fn every_other_sequence_of_bytes_is_refused_without_panic() {
        let good = Target { voters: vec![1, 2], learners: vec![3] }.encode();
        for cut in 1..good.len() {
            assert!(Change::decode(&good[..cut]).is_err(), "{cut}");
        }
        for at in 0..good.len() {
            for value in 0..=255u8 {
                let mut bytes = good.to_vec();
                bytes[at] = value;
                let _ = Change::decode(&bytes);
                let _ = Membership::decode(&bytes);
            }
        }
        assert_eq!(Change::decode(&[1, 1, 0, 0]), Err(MembershipError::NoVoter));
        assert_eq!(Change::decode(&[1, 1, 200]), Err(MembershipError::TooMany));
    }

    #[test]
    fn the_steps_are_those_that_are_missing() {
        let now = Membership { voters: vec![1, 2, 3], learners: vec![4], ..Membership::default() };
        let steps = |voters: &[u64], learners: &[u64]| {
            let target = Target { voters: voters.to_vec(), learners: learners.to_vec() };
            Change::Target(target).steps_from(&now).map(|steps| raft_steps(&steps.changes))
        };
        assert_eq!(steps(&[1, 2, 3], &[4]), None);
        assert_eq!(steps(&[1, 2, 4], &[]), Some("v4 r3".to_owned()));
        assert_eq!(steps(&[1, 2], &[3]), Some("l3 r4".to_owned()));
        assert_eq!(Change::Leave.steps_from(&now), None);
    }

    fn raft_steps(steps: &[ConfChangeSingle]) -> String {
        let word = |step: &ConfChangeSingle| match step.get_change_type() {
            ConfChangeType::AddNode => format!("v{}", step.node_id),
            ConfChangeType::AddLearnerNode => format!("l{}", step.node_id),
            ConfChangeType::RemoveNode => format!("r{}", step.node_id),
        };
        steps.iter().map(word).collect::<Vec<_>>().join(" ")
    }
}
