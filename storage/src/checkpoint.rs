//! What a shard's WAL no longer says: where each group stood when WAL files were retired. Pure codec,
//! plus the one atomic write (temporary file, sync, rename, sync of the directory).

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crate::entry::{GroupId, HardState};
use crate::leader_epochs::LeaderEpochs;
use crate::producer_state::take;

const MAGIC: u32 = 0x464C_4350;
/// Leader epochs kept per group: restarts of years. The oldest are dropped beyond it.
const EPOCHS_MAX: usize = 4096;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GroupCheckpoint {
    pub(crate) hard_state: HardState,
    /// The last entry that is in synced segments (or a control entry before it).
    pub(crate) last_index: u64,
    pub(crate) last_term: u64,
    pub(crate) log_start_offset: i64,
    /// Segments are synced up to here; less than this on disk is damage, not a torn tail.
    pub(crate) synced_end_offset: i64,
    pub(crate) leader_epochs: LeaderEpochs,
}

pub(crate) type Checkpoint = BTreeMap<GroupId, GroupCheckpoint>;

pub(crate) fn encode(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + checkpoint.len() * 96);
    out.extend(MAGIC.to_le_bytes());
    out.extend((checkpoint.len() as u32).to_le_bytes());
    for (id, g) in checkpoint {
        for word in
            [*id, g.hard_state.term, g.hard_state.vote, g.hard_state.commit, g.last_index, g.last_term]
        {
            out.extend(word.to_le_bytes());
        }
        out.extend(g.log_start_offset.to_le_bytes());
        out.extend(g.synced_end_offset.to_le_bytes());
        let starts = g.leader_epochs.starts();
        let starts = &starts[starts.len().saturating_sub(EPOCHS_MAX)..];
        out.extend((starts.len() as u32).to_le_bytes());
        for (epoch, offset) in starts {
            out.extend(epoch.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
    }
    let crc = crc32c::crc32c(&out);
    out.extend(crc.to_le_bytes());
    out
}

pub(crate) fn decode(bytes: &[u8]) -> Option<Checkpoint> {
    let (body, crc) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return None;
    }
    let mut rest = body;
    if u32::from_le_bytes(take(&mut rest)?) != MAGIC {
        return None;
    }
    let mut checkpoint = Checkpoint::new();
    for _ in 0..u32::from_le_bytes(take(&mut rest)?) {
        let mut words = [0u64; 6];
        for word in &mut words {
            *word = u64::from_le_bytes(take(&mut rest)?);
        }
        let [id, term, vote, commit, last_index, last_term] = words;
        let log_start_offset = i64::from_le_bytes(take(&mut rest)?);
        let synced_end_offset = i64::from_le_bytes(take(&mut rest)?);
        let mut starts = Vec::new();
        for _ in 0..u32::from_le_bytes(take(&mut rest)?) {
            starts.push((i32::from_le_bytes(take(&mut rest)?), i64::from_le_bytes(take(&mut rest)?)));
        }
        checkpoint.insert(
            id,
            GroupCheckpoint {
                hard_state: HardState { term, vote, commit },
                last_index,
                last_term,
                log_start_offset,
                synced_end_offset,
                leader_epochs: LeaderEpochs::from_starts(starts),
            },
        );
    }
    rest.is_empty().then_some(checkpoint)
}

/// Replaces `path` so that after a crash either the old or the new content is there, whole.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    flumen_io::sync_dir(path.parent().unwrap_or(Path::new(".")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_whole_or_not_at_all() {
        let mut checkpoint = Checkpoint::new();
        for id in 0..5 {
            checkpoint.insert(
                id,
                GroupCheckpoint {
                    last_index: id * 7,
                    synced_end_offset: 40,
                    leader_epochs: LeaderEpochs::from_starts(vec![(1, 0), (2, 9)]),
                    ..GroupCheckpoint::default()
                },
            );
        }
        let bytes = encode(&checkpoint);
        assert_eq!(decode(&bytes), Some(checkpoint));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 2;
            assert_eq!(decode(&bad), None);
            assert_eq!(decode(&bytes[..at]), None);
        }
    }
}
