//! `wal/states-<WAL id>`: the states of partitions as recovery left them, all in one file, because ten thousand files of a
//! hundred bytes take seconds to make.
//!
//! Pure: bytes in, states out. A file belongs to the WAL that recovery began, and counts from the moment at which
//! `wal/current` names that WAL. Each state stands by itself: damage to one says nothing of the others, and damage that
//! hides whose state it was makes every partition doubtful that is not known otherwise. See FORMAT.md for the bytes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::codec::Cursor;
use crate::group_state::GroupState;
use crate::types::GroupId;

const MAGIC: [u8; 4] = *b"FLST";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 24;
const ROW_BYTES: usize = 32;

/// A larger producer snapshot gets a file of its own: what is in here is read and written at every start.
pub(crate) const SNAPSHOT_BYTES_MAX: usize = 4 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Saved {
    pub state: GroupState,
    /// Producers as of the end of the log then, encoded as in a snapshot file; empty where it has a file.
    pub snapshot: Bytes,
}

/// What a file says.
#[derive(Debug, Default)]
pub(crate) struct States {
    by_name: BTreeMap<String, Saved>,
    /// Partitions whose state is there and cannot be read.
    damaged: BTreeSet<GroupId>,
    /// The file is missing, or somebody's state is that nobody can tell.
    pub hidden: bool,
}

pub(crate) fn file_name(wal_id: u64) -> String {
    format!("states-{wal_id:016x}")
}

/// Whether a file in `wal/` is one of these.
pub(crate) fn is_one(name: &str) -> bool {
    name.starts_with("states-")
}

pub(crate) fn encode(wal_id: u64, saved: &[Saved]) -> Vec<u8> {
    let mut rows = Vec::with_capacity(HEADER_BYTES + saved.len() * ROW_BYTES);
    rows.extend_from_slice(&MAGIC);
    rows.extend_from_slice(&VERSION.to_le_bytes());
    rows.extend_from_slice(&0u16.to_le_bytes());
    rows.extend_from_slice(&wal_id.to_le_bytes());
    let count = u32::try_from(saved.len()).expect("fewer partitions than that");
    rows.extend_from_slice(&count.to_le_bytes());
    rows.extend_from_slice(&crc32c::crc32c(&rows).to_le_bytes());
    let mut bodies: Vec<u8> = Vec::new();
    for Saved { state, snapshot } in saved {
        let position = HEADER_BYTES + saved.len() * ROW_BYTES + bodies.len();
        let encoded = state.encode();
        bodies.extend_from_slice(&encoded);
        bodies.extend_from_slice(snapshot);
        let start = rows.len();
        rows.extend_from_slice(&state.group.to_le_bytes());
        rows.extend_from_slice(&(position as u64).to_le_bytes());
        rows.extend_from_slice(&(encoded.len() as u32).to_le_bytes());
        rows.extend_from_slice(&(snapshot.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c(&rows[start..]);
        rows.extend_from_slice(&crc.to_le_bytes());
        rows.extend_from_slice(&0u32.to_le_bytes());
    }
    rows.extend_from_slice(&bodies);
    rows
}

fn row(bytes: &[u8]) -> Option<(GroupId, usize, usize, usize)> {
    let mut cursor = Cursor::new(bytes);
    let group = cursor.u64()?;
    let position = usize::try_from(cursor.u64()?).ok()?;
    let (state_len, snapshot_len) = (cursor.u32()?, cursor.u32()?);
    let whole = cursor.u32()? == crc32c::crc32c(&bytes[..ROW_BYTES - 8]);
    whole.then_some((group, position, state_len as usize, snapshot_len as usize))
}

impl States {
    /// No file was ever written: the directory is older than they are.
    pub fn none() -> States {
        States::default()
    }

    /// The file that should be there is not.
    pub fn missing() -> States {
        States { hidden: true, ..States::default() }
    }

    pub fn decode(bytes: &Bytes, wal_id: u64) -> States {
        let header = || {
            let mut cursor = Cursor::new(bytes.get(..HEADER_BYTES)?);
            let (magic, version, _) = (cursor.take(4)?, cursor.u16()?, cursor.u16()?);
            let (of, count, crc) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
            let whole = magic == MAGIC
                && version == VERSION
                && of == wal_id
                && crc == crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
            whole.then_some(count as usize)
        };
        let Some(count) = header() else { return States::missing() };
        let mut states = States::none();
        // As many rows as fit, whatever the count says.
        let rows = bytes[HEADER_BYTES..].chunks_exact(ROW_BYTES).take(count);
        states.hidden = rows.len() < count;
        for bytes_of_row in rows {
            let Some((group, position, state_len, snapshot_len)) = row(bytes_of_row) else {
                states.hidden = true;
                continue;
            };
            let found = || {
                let end = position.checked_add(state_len)?;
                let state = GroupState::decode(bytes.get(position..end)?)?;
                // A damaged snapshot is found out by its own checksum.
                let snapshot = end.checked_add(snapshot_len).filter(|upto| *upto <= bytes.len());
                let snapshot = snapshot.map_or(Bytes::new(), |upto| bytes.slice(end..upto));
                (state.group == group).then_some(Saved { state, snapshot })
            };
            match found() {
                Some(saved) => drop(states.by_name.insert(saved.state.dir_name.clone(), saved)),
                None => drop(states.damaged.insert(group)),
            }
        }
        states
    }

    /// What is known of the partition in directory `name`. `meta`: its `group.meta`, which counts if it was written by
    /// the run whose WAL is `wal_id`, or if nothing was written since.
    pub fn choose(
        &mut self,
        name: &str,
        group: Option<GroupId>,
        meta: Option<GroupState>,
        wal_id: u64,
    ) -> Chosen {
        let saved = self.by_name.remove(name);
        match (meta, saved) {
            (Some(meta), saved) if meta.wal_id == wal_id => {
                // One of the same name may have been deleted since.
                let own = saved.filter(|saved| saved.state.group == meta.group);
                Chosen { state: Some(meta), snapshot: own.map(|own| own.snapshot), is_saved: false }
            }
            (_, Some(saved)) => {
                Chosen { state: Some(saved.state), snapshot: Some(saved.snapshot), is_saved: true }
            }
            // An older one says less than what is lost, and counts fewer bytes than there are.
            (_, None) if self.hidden || group.is_some_and(|group| self.damaged.contains(&group)) => {
                Chosen::default()
            }
            (meta, None) => Chosen { state: meta, ..Chosen::default() },
        }
    }

    /// What is wrong with the file, if anything is.
    pub fn damage(&self) -> Option<String> {
        match (self.hidden, self.damaged.len()) {
            (true, _) => {
                Some("missing or damaged; which partitions' states are lost cannot be said".to_owned())
            }
            (false, 0) => None,
            (false, _) => Some(format!("the states of groups {:?} are damaged", self.damaged)),
        }
    }
}

/// The last known state of a partition before its WAL is looked at.
#[derive(Debug, Default)]
pub(crate) struct Chosen {
    pub state: Option<GroupState>,
    pub snapshot: Option<Bytes>,
    /// `state` is from the states file and nowhere else.
    pub is_saved: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WAL: u64 = 77;

    fn saved(group: GroupId) -> Saved {
        let mut state = GroupState::new(group, &format!("t-{group}.g{group}"));
        (state.wal_id, state.lsn, state.flushed_end) = (3, 9, 100 + group as i64);
        Saved { state, snapshot: Bytes::from(vec![group as u8; group as usize]) }
    }

    fn some() -> Vec<Saved> {
        (1..=5).map(saved).collect()
    }

    fn choose(states: &mut States, group: GroupId, meta: Option<GroupState>) -> Chosen {
        states.choose(&format!("t-{group}.g{group}"), Some(group), meta, WAL)
    }

    #[test]
    fn every_state_comes_back_and_a_newer_one_wins() {
        let mut states = States::decode(&encode(WAL, &some()).into(), WAL);
        assert_eq!(states.damage(), None);
        let chosen = choose(&mut states, 2, None);
        assert_eq!((chosen.state, chosen.is_saved), (Some(saved(2).state), true));
        assert_eq!(chosen.snapshot, Some(saved(2).snapshot));
        // Of an earlier run.
        let chosen = choose(&mut states, 3, Some(GroupState::new(3, "t-3.g3")));
        assert_eq!(chosen.state, Some(saved(3).state));
        // Of the last one.
        let meta = GroupState { wal_id: WAL, ..saved(4).state };
        let chosen = choose(&mut states, 4, Some(meta.clone()));
        assert_eq!((chosen.state, chosen.is_saved), (Some(meta), false));
        assert_eq!(chosen.snapshot, Some(saved(4).snapshot));
        // Of another partition that had the name before.
        let meta = GroupState { wal_id: WAL, ..GroupState::new(6, "t-5.g5") };
        let chosen = choose(&mut states, 5, Some(meta.clone()));
        assert_eq!((chosen.state, chosen.snapshot), (Some(meta), None));
        // It did not change in the last two runs.
        let meta = GroupState::new(9, "t-9.g9");
        assert_eq!(choose(&mut states, 9, Some(meta.clone())).state, Some(meta));
    }

    #[test]
    fn a_file_of_another_wal_is_none() {
        let mut states = States::decode(&encode(WAL + 1, &some()).into(), WAL);
        assert!(states.hidden && choose(&mut states, 1, None).state.is_none());
    }

    proptest! {
        /// Every partition is what it was, or nothing is known of it, and then not an older state either.
        #[test]
        fn damage_is_told(at in 0usize..2000, bit in 0u8..8, cut in 0usize..2000) {
            let mut bytes = encode(WAL, &some());
            let at = at % bytes.len();
            match cut.is_multiple_of(2) {
                true => bytes[at] ^= 1 << bit,
                false => bytes.truncate(at),
            }
            let mut states = States::decode(&bytes.into(), WAL);
            let mut whole = 0;
            for group in 1..=5 {
                let older = GroupState::new(group, &format!("t-{group}.g{group}"));
                match choose(&mut states, group, Some(older)).state {
                    Some(state) => {
                        prop_assert_eq!(state, saved(group).state);
                        whole += 1;
                    }
                    None => prop_assert!(states.damage().is_some()),
                }
            }
            // A flipped bit hides one state at most, unless it is in the header.
            prop_assert!(whole >= 4 || at < HEADER_BYTES || !cut.is_multiple_of(2));
        }

        #[test]
        fn random_bytes_are_no_states(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(States::decode(&bytes.into(), WAL).hidden);
        }
    }
}
