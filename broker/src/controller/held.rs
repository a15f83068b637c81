//! Which groups have a log on this node that has said something to others: `<data dir>/metadata/held`.
//!
//! A log that the metadata names and that is not there at a start may be one that was never made, as a crash came before it: then
//! it is made, and votes. If it is named here it was there, and somebody removed it: what it has promised is forgotten, so it
//! comes as a new replica does, and its vote goes before it gets it again (`cluster::mending`).
//!
//! Written whole (temporary file, sync, rename, sync of the directory), and again when there is more to say: soon after a log has its
//! first entry, and at a clean stop. It never names a log that a loss of power could take back. What was removed from here in the
//! ordinary way stays named for a while and does no harm: numbers of groups are not given again, and a replica that comes back does
//! so as a new one anyway. Where the file is missing or damaged nothing is known, as before there was one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::{Controller, METADATA_GROUP};
use crate::cluster::identity::write_whole;

const DIRECTORY: &str = "metadata";
const FILE: &str = "held";
const MAGIC: [u8; 4] = *b"FLHL";
const VERSION: u32 = 1;
const NUMBER_BYTES: usize = 8;
/// Magic, version and checksum.
const FRAME_BYTES: usize = 12;
/// Eight million groups; a file beyond it is not ours.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// A log has its first entry some milliseconds after it was made, and is not removed by hand before the broker was stopped.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

fn path_in(data_dir: &Path) -> PathBuf {
    data_dir.join(DIRECTORY).join(FILE)
}

fn encode(groups: &BTreeSet<u64>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FRAME_BYTES + groups.len() * NUMBER_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    groups.iter().for_each(|group| bytes.extend_from_slice(&group.to_le_bytes()));
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<BTreeSet<u64>> {
    let (body, checksum) = bytes.split_last_chunk::<4>()?;
    if u32::from_le_bytes(*checksum) != crc32c::crc32c(body) {
        return None;
    }
    let numbers = body.strip_prefix(&MAGIC)?.strip_prefix(&VERSION.to_le_bytes())?;
    let (numbers, []) = numbers.as_chunks::<NUMBER_BYTES>() else { return None };
    Some(numbers.iter().map(|number| u64::from_le_bytes(*number)).collect())
}

/// What cannot be read now is an error: it may be all that is left of a log.
pub(super) fn load(data_dir: &Path) -> io::Result<BTreeSet<u64>> {
    let path = path_in(data_dir);
    let bytes = match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(error),
        Ok(found) if found.len() > FILE_BYTES_MAX => Vec::new(),
        Ok(_) => fs::read(&path)?,
    };
    Ok(decode(&bytes).unwrap_or_else(|| {
        tracing::error!(path = %path.display(), "damaged; a log that was removed by hand would not be noticed in this start");
        BTreeSet::new()
    }))
}

fn store(data_dir: &Path, groups: &BTreeSet<u64>) -> io::Result<()> {
    write_whole(&data_dir.join(DIRECTORY), FILE, &encode(groups))
}

impl Controller {
    /// As long as the broker runs.
    pub(super) async fn keep_held_noted(self: Rc<Self>) {
        while !self.shard.is_stopping() {
            tokio::time::sleep(LOOK_INTERVAL).await;
            self.note_held().await;
        }
    }

    /// Writes down what there is, if that is more than was known.
    pub async fn note_held(&self) {
        let _alone = self.noting_held.lock().await;
        let known = self.held.borrow().clone();
        let mut found = BTreeSet::new();
        for shard in &self.shard.node.shards {
            let known = known.clone();
            let new = shard.run(move |shard| async move {
                let mut new = Vec::new();
                for partition in shard.partitions() {
                    let group_id = partition.group_id;
                    let may_be_new = group_id != METADATA_GROUP && !known.contains(&group_id);
                    if may_be_new && partition.has_stored_for_sure().await {
                        new.push(group_id);
                    }
                }
                new
            });
            found.extend(new.await.unwrap_or_default());
        }
        if found.is_empty() {
            return;
        }
        found.extend(known.iter());
        if self.shard.node.is_ready() {
            // The metadata is current: what went elsewhere or was deleted is named no longer.
            let (image, own) = (self.shard.node.image.load(), self.shard.node.config.node_id);
            let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
            let here: BTreeSet<u64> =
                partitions.filter(|info| info.is_held_by(own)).map(|info| info.group_id).collect();
            found.retain(|group| here.contains(group));
        }
        let all = Arc::new(found);
        let (data_dir, to_write) = (self.shard.node.data_dir.clone(), all.clone());
        match tokio::task::spawn_blocking(move || store(&data_dir, &to_write)).await {
            Ok(Ok(())) => drop(self.held.replace(all)),
            Ok(Err(error)) => {
                tracing::warn!(%error, "could not write down which logs are here; it is tried again")
            }
            Err(error) => tracing::warn!(%error, "writing down which logs are here failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_comes_back_or_is_called_damaged() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("metadata")).unwrap();
        assert_eq!(load(dir.path()).unwrap(), BTreeSet::new());
        let groups: BTreeSet<u64> = [1, 7, u64::from(u32::MAX) + 9].into();
        store(dir.path(), &groups).unwrap();
        assert_eq!(load(dir.path()).unwrap(), groups);
        let whole = encode(&groups);
        assert_eq!(decode(&encode(&BTreeSet::new())), Some(BTreeSet::new()));
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad), None, "byte {at}");
            assert_eq!(decode(&whole[..at]), None, "cut at {at}");
        }
        fs::write(path_in(dir.path()), b"x").unwrap();
        assert_eq!(load(dir.path()).unwrap(), BTreeSet::new());
    }
}
