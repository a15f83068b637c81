//! What happens to a data directory between opening it and starting the shards: every WAL left by the former run is
//! read, judged and moved into segments, deletions are finished, and a new WAL id makes the old blocks worthless.
//!
//! Offline and synchronous. The order is what makes it safe to be cut short: segments are synced, then the states of all
//! partitions written for the WAL that begins (`states_file`), then `wal/current` replaced, which makes them count; until
//! that last step everything can be done again with the same result.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flumen_io::{DirEntry, FileSystem, Mode};

use crate::anew;
use crate::codec::Cursor;
use crate::data_dir::{FORMAT, boot_id, open_error, replace_file};
use crate::failpoint::{self, Failpoint};
use crate::group_state::GroupState;
use crate::mutant::{self, Mutant};
use crate::producer_state::ProducerState;
use crate::receive;
use crate::replay::{Action, Position, Replayed, replay};
pub(crate) use crate::restore::Restored;
use crate::restore::{Afterwards, Found, RestoreError, restore};
use crate::states_file::{self, Chosen, Saved, States};
use crate::stop::parse_clean;
use crate::types::{GroupHealth, GroupId, HardState, LANES, Lane, OpenError, RecoveredGroup, UNKNOWN_GROUP};
use crate::wal_format::{
    BATCH, BEGINNING, BEGINNING_WITH, CONTROL, Found as FoundBlock, GROUP_DELETE, GROUP_STATE, HARD_STATE,
    LOG_START, PRODUCERS, RecordHeader, Suspects, judge, records, scan,
};

/// Up to this many files are synced one by one.
const SYNC_EACH_MAX: usize = 32;

pub(crate) const MARKER: &str = "DAMAGED";

pub(crate) type Records = BTreeMap<GroupId, Vec<(Position, Action)>>;

#[derive(Default)]
struct Directory {
    name: String,
    base: Chosen,
    /// Its files when recovery began, if it was there then.
    listed: Option<Vec<DirEntry>>,
    /// Reason given by an earlier start.
    marked: Option<String>,
}

struct Work {
    files: FileSystem,
    root: PathBuf,
    current: Option<Current>,
    wal_id: u64,
    groups: BTreeMap<GroupId, Directory>,
    deleted: BTreeSet<GroupId>,
    recovered: Vec<RecoveredGroup>,
    states: States,
    /// Whose directories have been brought up to date.
    restored: BTreeMap<String, GroupId>,
    /// What the next start has to know of the partitions whose `group.meta` does not say it.
    saved: BTreeMap<GroupId, Saved>,
    written: Vec<PathBuf>,
    dirs: BTreeSet<PathBuf>,
    afterwards: Vec<Afterwards>,
    warm_bytes: usize,
}

pub(crate) fn list(files: &FileSystem, path: &Path) -> Result<Vec<DirEntry>, OpenError> {
    files.list(path).map_err(|e| open_error(path, "listing", e))
}

fn read_text(files: &FileSystem, path: &Path) -> io::Result<String> {
    String::from_utf8(files.read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// `<dir>.<group>.deleted`
pub(crate) fn deleted_group(name: &str) -> Option<GroupId> {
    name.strip_suffix(".deleted")?.rsplit_once('.')?.1.parse().ok()
}

/// `<anything>.g<group>`: how the broker names directories, so that a damaged one is still known by its number.
fn group_in_name(name: &str) -> Option<GroupId> {
    name.rsplit_once(".g")?.1.parse().ok()
}

/// What is known of a partition before the WAL is looked at.
pub(crate) struct Known {
    pub base: Chosen,
    /// Whose the directory is, as its marker or its name says; for when there is no state.
    pub group: Option<GroupId>,
    /// Why an earlier start found that it cannot serve.
    pub marked: Option<String>,
}

/// Reads what a directory says of its partition; `listed` are its files. What cannot be read now is an error: it may be the
/// only thing that says what is wrong.
pub(crate) fn look_at(
    files: &FileSystem,
    dir: &Path,
    name: &str,
    listed: &[DirEntry],
    states: &mut States,
    current: Option<Current>,
) -> Result<Known, OpenError> {
    let read = |file: &str, doing: &'static str| match listed.iter().any(|entry| entry.name == file) {
        true => files.read(&dir.join(file)).map(Some).map_err(|error| open_error(dir, doing, error)),
        false => Ok(None),
    };
    let meta = read("group.meta", "reading group.meta")?;
    let meta = meta.and_then(|bytes| GroupState::decode(&bytes)).filter(|state| state.dir_name == name);
    let marker = read(MARKER, "reading DAMAGED")?.map(|text| parse_marker(&String::from_utf8_lossy(&text)));
    let (marked_group, marked) = marker.map_or((None, None), |(group, reason)| (group, Some(reason)));
    let group = marked_group.or_else(|| group_in_name(name));
    let of_meta = meta.as_ref().map(|meta| meta.group);
    let wal_id = current.map_or(0, |current| current.wal_id);
    Ok(Known { base: states.choose(name, of_meta.or(group), meta, wal_id), group, marked })
}

/// Whether a directory was created and nothing that counts was ever put into it: what is received counts only by a record.
pub(crate) fn is_unused(listed: &[DirEntry]) -> bool {
    listed.iter().all(|file| file.name == "group.new" || receive::is_unplaced(&file.name))
}

/// Why a directory that is in use and has no state cannot serve.
pub(crate) const STATELESS: &str = "its group.meta is missing or damaged, and the WAL does not know it";

/// A state with the position up to which it contains the WAL `wal_id`.
pub(crate) fn as_base(mut state: GroupState, wal_id: u64) -> (GroupState, Position) {
    let contains = state.wal_id == wal_id && state.lsn != 0;
    if !contains {
        // Commits of another WAL have nothing to do with those of this one.
        state.anew_lsn = 0;
    }
    let upto = if contains { (state.lsn, u32::MAX) } else { (0, 0) };
    (state, upto)
}

/// Content of a marker: `group <number>: <reason>`.
fn parse_marker(text: &str) -> (Option<GroupId>, String) {
    let parsed = text.strip_prefix("group ").and_then(|rest| {
        let (number, reason) = rest.split_once(": ")?;
        Some((number.parse().ok()?, reason))
    });
    match parsed {
        Some((group, reason)) => (Some(group), reason.trim().to_owned()),
        None => (None, text.trim().to_owned()),
    }
}

/// The third word of `wal/current`: there is a states file for this WAL.
const STATES: &str = "states";

fn current_crc(wal_id: u64, has_states: bool) -> u32 {
    let crc = crc32c::crc32c(&wal_id.to_le_bytes());
    if has_states { crc32c::crc32c_append(crc, STATES.as_bytes()) } else { crc }
}

/// The present WAL, and whether recovery wrote a states file when it began it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Current {
    pub wal_id: u64,
    has_states: bool,
}

/// What the last recovery knew of the partitions.
pub(crate) fn read_states(
    files: &FileSystem,
    wal: &Path,
    current: Option<Current>,
) -> Result<States, OpenError> {
    let Some(Current { wal_id, has_states: true }) = current else { return Ok(States::none()) };
    let path = wal.join(states_file::file_name(wal_id));
    let states = match files.read(&path) {
        Ok(bytes) => States::decode(&bytes.into(), wal_id),
        Err(error) if error.kind() == io::ErrorKind::NotFound => States::missing(),
        Err(error) => return Err(open_error(&path, "reading", error)),
    };
    if let Some(damage) = states.damage() {
        tracing::error!(path = %path.display(), damage, "the states of partitions cannot be read");
    }
    Ok(states)
}

pub(crate) fn read_current(files: &FileSystem, path: &Path) -> Result<Option<Current>, OpenError> {
    match read_text(files, path) {
        Ok(text) => {
            let mut words = text.split_ascii_whitespace();
            let id = words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
            let crc = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
            let has_states = words.next().is_some_and(|word| word == STATES);
            match (id, crc) {
                (Some(wal_id), Some(crc)) if crc == current_crc(wal_id, has_states) => {
                    Ok(Some(Current { wal_id, has_states }))
                }
                _ => Err(OpenError::Config(format!(
                    "{}: damaged, so it cannot be said which WAL blocks count; nothing was changed. The id stands in \
                     every block of wal/*/*.wal at byte 16",
                    path.display()
                ))),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(OpenError::Config(format!(
            "{}: damaged, so it cannot be said which WAL blocks count",
            path.display()
        ))),
        Err(error) => Err(open_error(path, "reading", error)),
    }
}

fn action(header: &RecordHeader, payload: Bytes) -> Option<Action> {
    match header.kind {
        BATCH | CONTROL => Some(Action::Entry {
            index: header.index,
            term: header.term,
            offset: header.offset,
            is_batch: header.kind == BATCH,
            payload,
        }),
        HARD_STATE => {
            let mut cursor = Cursor::new(&payload);
            let (vote, commit) = (cursor.u64()?, cursor.u64()?);
            let membership = cursor.u64().map(|index| (index, payload.slice(24..)));
            Some(Action::Hard(HardState { term: header.term, vote, commit }, membership))
        }
        LOG_START => {
            let begins = Cursor::new(&payload).i64().filter(|_| header.index > 0);
            Some(Action::LogStart(header.offset, begins.map(|begins| (header.index, begins))))
        }
        GROUP_STATE => GroupState::decode(&payload)
            .filter(|state| state.group == header.group)
            .map(|state| Action::State(Box::new(state))),
        BEGINNING | BEGINNING_WITH => anew::decode(&payload, header.kind)
            .filter(|begun| begun.state.group == header.group)
            .map(|begun| {
                let producers = payload.slice(begun.producers_at..);
                Action::Beginning(Box::new(begun.state), producers, begun.segments)
            }),
        GROUP_DELETE => Some(Action::Delete),
        PRODUCERS => Some(Action::Producers(payload)),
        _ => None,
    }
}

pub(crate) struct Ring {
    path: PathBuf,
    lane: Lane,
    /// No commit of the former run is in it.
    empty: bool,
    /// How many commits count, and whether something behind them was cut off.
    pub commits: u64,
    pub torn: bool,
    pub damage: Vec<(String, Suspects)>,
}

/// Reads one lane of one shard into `out`.
pub(crate) fn read_ring(
    disk: &FileSystem,
    path: &Path,
    lane: Lane,
    shard: u32,
    wal_id: u64,
    out: &mut Records,
) -> Result<Ring, OpenError> {
    let mut files = Vec::new();
    let mut found: Vec<FoundBlock> = Vec::new();
    let listed = list(disk, path)?.into_iter().map(|entry| entry.name);
    for name in listed.filter(|name| name.ends_with(".wal")) {
        let file_path = path.join(name);
        // A killed process leaves in memory what the disk may not have; what is done because of it must not outlive it.
        let synced = disk.open(&file_path, Mode::default()).and_then(|file| file.sync_data());
        synced.map_err(|e| open_error(&file_path, "syncing", e))?;
        let bytes = disk.read(&file_path).map_err(|e| open_error(&file_path, "reading", e))?;
        scan(&bytes, files.len(), wal_id, lane as u16, shard, &mut found);
        files.push((file_path, Bytes::from(bytes)));
    }
    // The os lane promises nothing over a loss of power; then it ends where the kernel had not written yet.
    let newest = found.iter().filter(|block| block.payload_ok).max_by_key(|block| block.header.sequence);
    let same_boot = newest.is_none_or(|block| block.header.boot_id == boot_id(disk))
        || mutant::is(Mutant::ForgetsPowerLoss);
    let judged = judge(&found, lane == Lane::Os && !same_boot);
    let mut ring = Ring {
        path: path.to_owned(),
        lane,
        empty: found.is_empty(),
        commits: judged.live.len() as u64,
        torn: judged.torn,
        damage: Vec::new(),
    };
    for (sequence, suspects) in judged.damage {
        ring.damage.push((format!("commit {sequence} in {} is damaged", path.display()), suspects));
    }
    if judged.torn {
        tracing::info!(ring = %path.display(), "cut an unfinished commit off the end");
    }
    for k in judged.live {
        let block = &found[k];
        let Some((file_path, bytes)) = files.get(block.file) else { continue };
        let payload_end = block.payload_at + block.header.payload_len as usize;
        let payload = bytes.slice(block.payload_at..payload_end);
        for (number, record) in records(&payload).enumerate() {
            let parsed = record
                .map(|(header, range)| (header.group, header.kind, action(&header, payload.slice(range))));
            match parsed {
                Some((group, _, Some(action))) => {
                    let position = (block.header.lsn, u32::try_from(number).unwrap_or(u32::MAX));
                    out.entry(group).or_default().push((position, action));
                }
                Some((_, crate::wal_format::NOTHING, None)) => {}
                malformed => {
                    let what = malformed.map_or("a record".to_owned(), |(group, kind, _)| {
                        format!("a record of kind {kind} of group {group}")
                    });
                    let reason = format!(
                        "{what} in commit {} of {} cannot be read",
                        block.header.sequence,
                        file_path.display()
                    );
                    ring.damage.push((reason, Suspects::Groups(block.header.groups)));
                    break;
                }
            }
        }
    }
    Ok(ring)
}

impl Work {
    fn dir(&self, name: &str) -> PathBuf {
        self.root.join("log").join(name)
    }

    fn list_groups(&mut self) -> Result<(Vec<PathBuf>, Vec<(String, Vec<DirEntry>)>), OpenError> {
        let (mut deletions, mut nameless, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
        let log = self.root.join("log");
        for DirEntry { name, is_dir, .. } in list(&self.files, &log)? {
            let path = log.join(&name);
            if !is_dir {
                continue;
            }
            if name.ends_with(".deleted") {
                self.deleted.extend(deleted_group(&name).filter(|group| *group != UNKNOWN_GROUP));
                deletions.push(path);
                continue;
            }
            let listed = list(&self.files, &path)?;
            let Known { base, group, marked } =
                look_at(&self.files, &path, &name, &listed, &mut self.states, self.current)?;
            match base.state.as_ref().map(|state| state.group) {
                Some(group) => {
                    let directory = Directory { name, base, listed: Some(listed), marked };
                    if let Some(other) = self.groups.insert(group, directory) {
                        return Err(OpenError::Config(format!(
                            "directories {} and another in {} say that they are group {group}; remove the copy",
                            other.name,
                            log.display()
                        )));
                    }
                }
                None => match group {
                    Some(group) => {
                        nameless.push((group, Directory { name, base, listed: Some(listed), marked }))
                    }
                    None => unknown.push((name, listed)),
                },
            }
        }
        for (group, directory) in nameless {
            self.groups.entry(group).or_insert(directory);
        }
        Ok((deletions, unknown))
    }

    /// The next start must refuse as well, when the WAL that shows the damage is out of the way: without a marker that is
    /// sure to be there, this one ends.
    fn damaged(&mut self, group_id: GroupId, dir_name: &str, reason: String) -> Result<(), OpenError> {
        tracing::error!(group_id, directory = dir_name, reason, "damaged partition; it refuses to serve");
        let dir = self.dir(dir_name);
        if self.files.is_dir(&dir) && !dir_name.is_empty() {
            let marker = dir.join(MARKER);
            let line = format!("group {group_id}: {reason}\n");
            // One that is there may be from a start that was cut short.
            let marked = if self.files.exists(&marker) {
                self.files.sync_dir(&dir)
            } else {
                replace_file(&self.files, &marker, line.as_bytes())
            };
            marked.map_err(|error| open_error(&marker, "writing", error))?;
        }
        let state = self.groups.get(&group_id).and_then(|directory| directory.base.state.clone());
        let state = state.unwrap_or_else(|| GroupState::new(group_id, dir_name));
        self.recovered.push(RecoveredGroup {
            group_id,
            dir_name: dir_name.to_owned(),
            health: GroupHealth::Damaged { reason },
            hard_state: HardState {
                commit: state.hard_state.commit.min(state.flushed_index),
                ..state.hard_state
            },
            last_index: state.flushed_index,
            last_term: state.flushed_term,
            log_start_offset: state.log_start.min(state.flushed_end),
            log_end_offset: state.flushed_end,
            producers: ProducerState::new(),
            restored: Restored::default(),
        });
        Ok(())
    }

    /// Brings one partition up to date. `Ok(false)`: it is damaged.
    fn group(&mut self, group_id: GroupId, log: &[(Position, Action)]) -> Result<bool, OpenError> {
        if self.deleted.contains(&group_id) {
            return Ok(true);
        }
        let state = self.groups.get(&group_id).and_then(|directory| directory.base.state.clone());
        let base = state.map(|state| as_base(state, self.wal_id));
        let known_name = base.as_ref().map(|(state, _)| state.dir_name.clone());
        let replayed = match replay(base, log) {
            Ok(Some(replayed)) => replayed,
            Ok(None) => return Ok(true),
            Err(reason) => {
                let from_log = log.iter().rev().find_map(|(_, action)| match action {
                    Action::State(state) | Action::Beginning(state, ..) => Some(state.dir_name.clone()),
                    _ => None,
                });
                self.damaged(group_id, &known_name.or(from_log).unwrap_or_default(), reason)?;
                return Ok(false);
            }
        };
        let dir_name = replayed.state.dir_name.clone();
        if replayed.deleted {
            // Its directory was renamed before the deletion was recorded; what has its name now is another group's.
            self.deleted.insert(group_id);
            return Ok(true);
        }
        if let Some(other) = self.restored.get(&dir_name) {
            let reason = format!("its directory, {dir_name}, is that of group {other}");
            self.damaged(group_id, "", reason)?;
            return Ok(false);
        }
        self.restored.insert(dir_name.clone(), group_id);
        self.restore(group_id, &dir_name, replayed, !log.is_empty())
    }

    fn restore(
        &mut self,
        group_id: GroupId,
        dir_name: &str,
        replayed: Replayed,
        changed: bool,
    ) -> Result<bool, OpenError> {
        let dir = self.dir(dir_name);
        // One that the WAL alone knew was not looked at.
        let directory = self.groups.get_mut(&group_id);
        let snapshot = directory.as_ref().and_then(|directory| directory.base.snapshot.clone());
        let listed = match directory.and_then(|directory| directory.listed.take()) {
            Some(listed) => listed,
            None if self.files.is_dir(&dir) => list(&self.files, &dir)?,
            None => {
                self.files.create_dir(&dir).map_err(|e| open_error(&dir, "creating the directory", e))?;
                self.dirs.insert(self.root.join("log"));
                Vec::new()
            }
        };
        let found = Found { listed, snapshot };
        let outcome = match restore(&self.files, &dir, found, replayed, changed, &mut self.warm_bytes) {
            Ok(outcome) => outcome,
            Err(RestoreError::Damaged(reason)) => {
                self.damaged(group_id, dir_name, reason)?;
                return Ok(false);
            }
            Err(RestoreError::Io(path, error)) => return Err(open_error(&path, "recovering", error)),
        };
        let mut state = outcome.state;
        if outcome.changed {
            state.wal_id = self.wal_id;
            state.lsn = u64::MAX;
        }
        if outcome.changed || outcome.snapshot.is_some() {
            let snapshot = outcome.snapshot.unwrap_or_default();
            self.saved.insert(group_id, Saved { state: state.clone(), snapshot });
        }
        if outcome.names_changed {
            self.dirs.insert(dir);
        }
        self.written.extend(outcome.written);
        self.afterwards.extend(outcome.afterwards);
        self.recovered.push(RecoveredGroup {
            group_id,
            dir_name: dir_name.to_owned(),
            health: GroupHealth::Ok,
            hard_state: state.hard_state,
            last_index: outcome.last_index,
            last_term: outcome.last_term,
            log_start_offset: state.log_start,
            log_end_offset: outcome.log_end,
            producers: outcome.producers,
            restored: outcome.restored,
        });
        Ok(true)
    }

    /// States for the WAL that begins. Those that nothing changed go on standing where they stood: some in the file that
    /// is being replaced.
    fn take_saved(&mut self) -> Vec<Saved> {
        for (group, Directory { base, .. }) in std::mem::take(&mut self.groups) {
            if let (true, Some(state)) = (base.is_saved && !self.deleted.contains(&group), base.state) {
                let snapshot = base.snapshot.unwrap_or_default();
                self.saved.entry(group).or_insert(Saved { state, snapshot });
            }
        }
        std::mem::take(&mut self.saved).into_values().collect()
    }

    fn sync(&mut self) -> Result<(), OpenError> {
        if mutant::is(Mutant::SkipsSyncOfRecovery) {
            return Ok(());
        }
        let (root, disk) = (self.root.clone(), &self.files);
        let result = if self.written.len() + self.dirs.len() > SYNC_EACH_MAX {
            disk.sync_all(&root)
        } else {
            let files =
                self.written.iter().try_for_each(|path| disk.open(path, Mode::default())?.sync_data());
            files.and_then(|()| self.dirs.iter().try_for_each(|dir| disk.sync_dir(dir)))
        };
        result.map_err(|e| open_error(&root, "syncing", e))
    }
}

/// Whether a shard stopped with nothing left in its rings, and which partitions it had deleted.
pub(crate) fn clean(files: &FileSystem, ring: &Path, wal_id: u64) -> Option<Vec<GroupId>> {
    parse_clean(&read_text(files, &ring.join("CLEAN")).ok()?, wal_id)
}

/// What the name of a ring ends with that is kept for repair.
fn kept_suffix(wal_id: u64) -> String {
    format!(".damaged-{wal_id:016x}")
}

/// The rings of every shard that a former run had, one for each lane. Those of the present WAL that were put aside belong to
/// it: that recovery did not get to the end.
pub(crate) fn rings(
    files: &FileSystem,
    wal: &Path,
    wal_id: u64,
) -> Result<BTreeMap<u32, [Option<PathBuf>; 2]>, OpenError> {
    let mut shards: BTreeMap<u32, [Option<PathBuf>; 2]> = BTreeMap::new();
    let suffix = kept_suffix(wal_id);
    for DirEntry { name, is_dir, .. } in list(files, wal)? {
        let ring = name.strip_suffix(&suffix).unwrap_or(&name);
        let (number, lane) = match ring.strip_suffix("-os") {
            Some(number) => (number, Lane::Os),
            None => (ring, Lane::Durable),
        };
        if let Ok(number) = number.parse::<u32>()
            && is_dir
        {
            shards.entry(number).or_default()[lane as usize] = Some(wal.join(&name));
        }
    }
    Ok(shards)
}

pub(crate) fn recover(
    files: &FileSystem,
    root: &Path,
    cache_hint: usize,
) -> Result<(Vec<RecoveredGroup>, u64), OpenError> {
    let wal = root.join("wal");
    let current = wal.join("current");
    let before = read_current(files, &current)?;
    let former = before.map(|before| before.wal_id);
    let mut work = Work {
        files: files.clone(),
        root: root.to_owned(),
        current: before,
        wal_id: former.unwrap_or(0),
        groups: BTreeMap::new(),
        deleted: BTreeSet::new(),
        recovered: Vec::new(),
        states: read_states(files, &wal, before)?,
        restored: BTreeMap::new(),
        saved: BTreeMap::new(),
        written: Vec::new(),
        dirs: BTreeSet::new(),
        afterwards: Vec::new(),
        warm_bytes: cache_hint,
    };
    let (deletions, mut unknown) = work.list_groups()?;
    let mut shards = Vec::new();
    for (shard, lanes) in rings(files, &wal, work.wal_id)? {
        let Some(wal_id) = former else { continue };
        let durable = lanes[Lane::Durable as usize].as_ref();
        match durable.and_then(|ring| clean(files, ring, wal_id)) {
            Some(deleted) => work.deleted.extend(deleted),
            None => shards.push((shard, lanes, wal_id)),
        }
    }
    let mut seen: BTreeSet<GroupId> = BTreeSet::new();
    let marked: Vec<(GroupId, String, String)> = work
        .groups
        .iter()
        .filter_map(|(group, directory)| Some((*group, directory.name.clone(), directory.marked.clone()?)))
        .collect();
    for (group, name, reason) in marked {
        if seen.insert(group) && !work.deleted.contains(&group) {
            work.damaged(group, &name, reason)?;
        }
    }
    let mut kept_rings = Vec::new();
    // That a partition exists is written to the durable lane.
    let mut creations_hidden = work.states.hidden;
    for (shard, lanes, wal_id) in shards {
        let mut log = Records::new();
        let mut rings = Vec::new();
        for (lane, path) in LANES.into_iter().zip(&lanes) {
            if let Some(path) = path {
                rings.push(read_ring(files, path, lane, shard, wal_id, &mut log)?);
            }
        }
        let damage: Vec<&(String, Suspects)> = rings.iter().flat_map(|ring| &ring.damage).collect();
        let mut keep = !damage.is_empty();
        creations_hidden |= rings.iter().any(|ring| ring.lane == Lane::Durable && !ring.damage.is_empty());
        // The names of partitions that are only in this WAL.
        for (group, records) in &mut log {
            records.sort_by_key(|(position, _)| *position);
            let state = records.iter().rev().find_map(|(_, action)| match action {
                Action::State(state) | Action::Beginning(state, ..) => Some(state),
                _ => None,
            });
            if let Some(state) = state {
                unknown.retain(|(name, _)| *name != state.dir_name);
                let directory = Directory { name: state.dir_name.clone(), ..Directory::default() };
                work.groups.entry(*group).or_insert(directory);
            }
        }
        let suspects: Vec<(GroupId, String, String)> = work
            .groups
            .iter()
            .filter(|(group, _)| !seen.contains(group) && !work.deleted.contains(group))
            .filter_map(|(group, directory)| {
                let (reason, _) = damage.iter().find(|(_, who)| who.contains(*group))?;
                Some((*group, directory.name.clone(), reason.clone()))
            })
            .collect();
        for (group, name, reason) in suspects {
            seen.insert(group);
            work.damaged(group, &name, reason)?;
        }
        for (group, records) in log {
            if seen.insert(group) {
                keep |= !work.group(group, &records)?;
            }
        }
        if keep {
            kept_rings.extend(rings.into_iter().filter(|ring| !ring.empty).map(|ring| ring.path));
        }
    }
    let rest: Vec<GroupId> = work.groups.keys().copied().filter(|group| !seen.contains(group)).collect();
    let mut without_state: Vec<(GroupId, String, Vec<DirEntry>)> = Vec::new();
    for group in rest {
        match work.groups.get_mut(&group) {
            Some(Directory { base: Chosen { state: None, .. }, name, listed, .. }) => {
                without_state.push((group, name.clone(), listed.take().unwrap_or_default()));
            }
            _ => {
                work.group(group, &[])?;
            }
        }
    }
    without_state.extend(unknown.into_iter().map(|(name, listed)| (UNKNOWN_GROUP, name, listed)));
    for (group, name, listed) in without_state {
        let path = root.join("log").join(&name);
        if is_unused(&listed) && !creations_hidden {
            // Created, and nothing of it ever committed.
            files.remove_dir_all(&path).map_err(|e| open_error(&path, "removing", e))?;
        } else {
            work.damaged(group, &name, STATELESS.to_owned())?;
        }
    }
    // A killed process may have left names of partitions that were never synced; from here on we rely on them.
    work.dirs.insert(root.join("log"));
    work.sync()?;
    failpoint::pass(Failpoint::RecoverySynced);
    let wal_id = if mutant::is(Mutant::KeepsWalId) { former } else { None };
    let wal_id = wal_id.unwrap_or_else(|| files.random_id());
    let saved = work.take_saved();
    let states = wal.join(states_file::file_name(wal_id));
    replace_file(files, &states, &states_file::encode(wal_id, &saved))
        .map_err(|e| open_error(&states, "writing", e))?;
    let format = root.join("FORMAT");
    if files.read(&format).map_err(|e| open_error(&format, "reading", e))?.trim_ascii() != FORMAT.as_bytes() {
        // A version that knows no such file must not take older states for the last ones.
        replace_file(files, &format, format!("{FORMAT}\n").as_bytes())
            .map_err(|e| open_error(&format, "writing", e))?;
    }
    failpoint::pass(Failpoint::RecoveryStates);
    for ring in kept_rings {
        let name = ring.file_name().and_then(|name| name.to_str()).unwrap_or("ring").to_owned();
        let suffix = kept_suffix(work.wal_id);
        if name.ends_with(&suffix) {
            continue;
        }
        let kept = wal.join(name + &suffix);
        files.rename(&ring, &kept).map_err(|e| open_error(&ring, "putting aside", e))?;
        tracing::error!(ring = %kept.display(), "kept for repair");
    }
    // From here on the old blocks do not count.
    let line = format!("{wal_id:016x} {:08x} {STATES}\n", current_crc(wal_id, true));
    replace_file(files, &current, line.as_bytes()).map_err(|e| open_error(&current, "writing", e))?;
    failpoint::pass(Failpoint::RecoveryCurrent);
    for entry in list(files, &wal)?.iter().filter(|entry| states_file::is_one(&entry.name)) {
        let path = wal.join(&entry.name);
        if path != states {
            files.remove_file(&path).map_err(|e| open_error(&path, "removing", e))?;
        }
    }
    for step in work.afterwards {
        let (path, result) = match &step {
            Afterwards::Shorten(path, bytes) => {
                let file = files.open(path, Mode { write: true, ..Mode::default() });
                (path, file.and_then(|file| file.set_len(*bytes)))
            }
            Afterwards::Remove(path) if files.is_dir(path) => (path, files.remove_dir_all(path)),
            Afterwards::Remove(path) => (path, files.remove_file(path)),
        };
        match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(open_error(path, "finishing recovery", error));
            }
            _ => {}
        }
    }
    for path in deletions {
        files.remove_dir_all(&path).map_err(|e| open_error(&path, "removing", e))?;
    }
    work.recovered.sort_by_key(|group| group.group_id);
    Ok((work.recovered, wal_id))
}
