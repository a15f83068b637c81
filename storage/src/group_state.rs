//! What is known of a partition at one point of the WAL: the content of `group.meta` and of group state records.
//!
//! Pure. See FORMAT.md for the bytes and for what "flushed" promises.

use bytes::Bytes;

use crate::codec::Cursor;
use crate::leader_epochs::{LeaderEpochs, MAX_EPOCHS};
use crate::marks::{Before, Marks};
use crate::types::{GroupId, HardState};

const MAGIC: [u8; 4] = *b"FLGS";
const VERSION: u16 = 3;
const FLAG_OS: u16 = 1;
const FIXED_BYTES: usize = 108;

/// Longest directory name a file system takes, with room for the suffix of a deletion.
pub const MAX_DIR_NAME_BYTES: usize = 220;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupState {
    pub group: GroupId,
    pub dir_name: String,
    pub os: bool,
    /// Everything of this WAL up to this LSN is contained.
    pub wal_id: u64,
    pub lsn: u64,
    pub hard_state: HardState,
    pub flushed_index: u64,
    pub flushed_term: u64,
    pub flushed_end: i64,
    /// Base offset of the segment being written and how much of it is good; -1 before the first one.
    pub active_base: i64,
    pub active_bytes: u64,
    pub log_start: i64,
    pub epochs: LeaderEpochs,
    /// Entries up to here are known to be committed, whatever the hard state says.
    pub committed_index: u64,
    /// The commit of this WAL with which the log began anew; what came before it does not count. 0: none.
    pub anew_lsn: u64,
    /// Index of the entry that made it so, and who the members are, in the broker's words.
    pub membership: Option<(u64, Bytes)>,
    /// Up to `flushed_index`.
    pub marks: Marks,
}

impl GroupState {
    pub fn new(group: GroupId, dir_name: &str) -> Self {
        Self {
            group,
            dir_name: dir_name.to_owned(),
            os: false,
            wal_id: 0,
            lsn: 0,
            hard_state: HardState::default(),
            flushed_index: 0,
            flushed_term: 0,
            flushed_end: 0,
            active_base: -1,
            active_bytes: 0,
            log_start: 0,
            epochs: LeaderEpochs::default(),
            committed_index: 0,
            anew_lsn: 0,
            membership: None,
            marks: Marks::default(),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(FIXED_BYTES + self.dir_name.len() + 12 * self.epochs.entries().len() + 4);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(if self.os { FLAG_OS } else { 0 }).to_le_bytes());
        for word in [
            self.group,
            self.wal_id,
            self.lsn,
            self.hard_state.term,
            self.hard_state.vote,
            self.hard_state.commit,
            self.flushed_index,
            self.flushed_term,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.flushed_end.to_le_bytes());
        out.extend_from_slice(&self.active_base.to_le_bytes());
        out.extend_from_slice(&self.active_bytes.to_le_bytes());
        out.extend_from_slice(&self.log_start.to_le_bytes());
        out.extend_from_slice(&(self.dir_name.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.epochs.entries().len() as u16).to_le_bytes());
        out.extend_from_slice(self.dir_name.as_bytes());
        for (epoch, start) in self.epochs.entries() {
            out.extend_from_slice(&epoch.to_le_bytes());
            out.extend_from_slice(&start.to_le_bytes());
        }
        out.extend_from_slice(&self.committed_index.to_le_bytes());
        out.extend_from_slice(&self.anew_lsn.to_le_bytes());
        let (index, members) =
            self.membership.as_ref().map_or((0, &[][..]), |(index, bytes)| (*index, &bytes[..]));
        out.extend_from_slice(&index.to_le_bytes());
        // Bounded where it comes in.
        out.extend_from_slice(&(members.len() as u16).to_le_bytes());
        out.extend_from_slice(members);
        self.marks.encode(&mut out);
        let check = masked_crc(&out);
        out.extend_from_slice(&check.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        let mut cursor = Cursor::new(body);
        let (magic, version) = (cursor.take(4)?, cursor.u16()?);
        let check = match version {
            1 => crc32c::crc32c(body),
            2 | VERSION => masked_crc(body),
            _ => return None,
        };
        if magic != MAGIC || check != u32::from_le_bytes(*crc) {
            return None;
        }
        let flags = cursor.u16()?;
        let group = cursor.u64()?;
        let wal_id = cursor.u64()?;
        let lsn = cursor.u64()?;
        let hard_state = HardState { term: cursor.u64()?, vote: cursor.u64()?, commit: cursor.u64()? };
        let flushed_index = cursor.u64()?;
        let flushed_term = cursor.u64()?;
        let flushed_end = cursor.i64()?;
        let active_base = cursor.i64()?;
        let active_bytes = cursor.u64()?;
        let log_start = cursor.i64()?;
        let name_len = usize::from(cursor.u16()?);
        let epoch_count = usize::from(cursor.u16()?);
        let dir_name = std::str::from_utf8(cursor.take(name_len)?).ok()?.to_owned();
        if !valid_dir_name(&dir_name) || epoch_count > MAX_EPOCHS || flushed_end < 0 || log_start < 0 {
            return None;
        }
        let mut epochs = LeaderEpochs::default();
        for _ in 0..epoch_count {
            let epoch = cursor.i32()?;
            epochs.assign(epoch, cursor.i64()?);
        }
        let (mut committed_index, mut anew_lsn, mut membership) = (0, 0, None);
        // Before version 3 nobody wrote down which index a batch has: other replicas get what comes from now on.
        let mut marks =
            Marks::beginning(Before { index: flushed_index, term: flushed_term, offset: flushed_end });
        if version >= 3 {
            (committed_index, anew_lsn) = (cursor.u64()?, cursor.u64()?);
            let (index, length) = (cursor.u64()?, usize::from(cursor.u16()?));
            let members = cursor.take(length)?;
            membership = (length > 0).then(|| (index, Bytes::copy_from_slice(members)));
            marks = Marks::decode(&mut cursor)?;
        }
        cursor.is_empty().then_some(Self {
            group,
            dir_name,
            os: flags & FLAG_OS != 0,
            wal_id,
            lsn,
            hard_state,
            flushed_index,
            flushed_term,
            flushed_end,
            active_base,
            active_bytes,
            log_start,
            epochs,
            committed_index,
            anew_lsn,
            membership,
            marks,
        })
    }
}

/// A state is part of a WAL block, which has a checksum of the same kind. That one cannot see whole states with their own
/// checksum change places with others of the same length, as a torn write over an older block can make them: to a CRC the
/// difference of two such states is nothing. Turned and added to, the checksum is no longer one.
fn masked_crc(body: &[u8]) -> u32 {
    crc32c::crc32c(body).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A single path component that cannot be mistaken for a deletion in progress.
pub fn valid_dir_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_DIR_NAME_BYTES
        && name != "."
        && name != ".."
        && !name.ends_with(".deleted")
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> GroupState {
        let mut state = GroupState::new(42, "orders-7");
        state.os = true;
        (state.wal_id, state.lsn) = (3, 99);
        state.hard_state = HardState { term: 5, vote: 1, commit: 1000 };
        (state.flushed_index, state.flushed_term, state.flushed_end) = (990, 5, 123_456);
        (state.active_base, state.active_bytes, state.log_start) = (100_000, 7_777, 50);
        state.epochs.assign(3, 0);
        state.epochs.assign(5, 100);
        (state.committed_index, state.anew_lsn) = (985, 12);
        state.membership = Some((700, Bytes::from_static(b"members")));
        state.marks = Marks::beginning(Before { index: 600, term: 3, offset: 90_000 });
        state.marks.note(700, 3, 95_000, Some(&Bytes::from_static(b"change")), 0);
        state.marks.note(800, 5, 99_000, Some(&Bytes::new()), 0);
        state
    }

    #[test]
    fn round_trip() {
        assert_eq!(GroupState::decode(&example().encode()), Some(example()));
        assert!(!valid_dir_name("../x") && !valid_dir_name("") && !valid_dir_name("a.9.deleted"));
        assert!(valid_dir_name("__consumer_offsets-12"));
    }

    /// Regression: a torn write that put an older state in the place of a newer one left a whole block, to its checksum.
    #[test]
    fn one_state_in_the_place_of_another_changes_the_checksum_around_them() {
        let mut other = example();
        other.hard_state.vote = 2;
        let around = |state: &GroupState| {
            let mut block = b"before".to_vec();
            block.extend_from_slice(&state.encode());
            block.extend_from_slice(b"behind");
            crc32c::crc32c(&block)
        };
        assert_ne!(around(&example()), around(&other));
    }

    #[test]
    fn former_versions_are_read() {
        let mut wanted = GroupState { committed_index: 0, anew_lsn: 0, membership: None, ..example() };
        wanted.marks = Marks::beginning(Before { index: 990, term: 5, offset: 123_456 });
        let mut bytes = example().encode();
        bytes.truncate(FIXED_BYTES + "orders-7".len() + 2 * 12);
        bytes[4] = 2;
        let with = |check: u32| [&bytes[..], &check.to_le_bytes()].concat();
        assert_eq!(GroupState::decode(&with(masked_crc(&bytes))), Some(wanted.clone()));
        bytes[4] = 1;
        let with = |check: u32| [&bytes[..], &check.to_le_bytes()].concat();
        assert_eq!(GroupState::decode(&with(crc32c::crc32c(&bytes))), Some(wanted));
    }

    proptest! {
        #[test]
        fn flips_are_refused(at in 0usize..1000, bit in 0u8..8) {
            let mut bytes = example().encode();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(GroupState::decode(&bytes), None);
        }

        #[test]
        fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert_eq!(GroupState::decode(&bytes), None);
        }
    }
}
