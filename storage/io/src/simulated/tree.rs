//! The names of a simulated disk: directories as the process sees them, as they surely are, and what was done since the
//! last sync of each. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Component, Path, PathBuf};

use super::content::Content;
use super::faults::{Counters, Fault};
use super::random::Random;

pub type NodeId = u64;

pub const ROOT: NodeId = 0;

#[derive(Debug, Clone)]
enum Change {
    Link(String, NodeId),
    Unlink(String),
    Rename(String, String, NodeId),
}

#[derive(Debug, Clone, Default)]
pub struct Dir {
    names: BTreeMap<String, NodeId>,
    durable: BTreeMap<String, NodeId>,
    changes: Vec<Change>,
}

#[derive(Debug, Clone)]
pub enum Node {
    File(Content),
    Dir(Dir),
}

#[derive(Debug, Clone)]
pub struct Tree {
    nodes: BTreeMap<NodeId, Node>,
    next: NodeId,
}

pub fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn apply(names: &mut BTreeMap<String, NodeId>, change: Change) {
    match change {
        Change::Link(name, node) => {
            names.insert(name, node);
        }
        Change::Unlink(name) => {
            names.remove(&name);
        }
        Change::Rename(from, to, node) => {
            names.remove(&from);
            names.insert(to, node);
        }
    }
}

impl Dir {
    fn change(&mut self, change: Change) {
        apply(&mut self.names, change.clone());
        self.changes.push(change);
    }

    pub fn sync(&mut self) {
        self.changes.clear();
        self.durable = self.names.clone();
    }

    /// Journals keep the order of changes and lose an end of them; without a journal each is kept or lost by itself.
    fn lose_power(&mut self, random: &mut Random, counters: &mut Counters) {
        let changes = std::mem::take(&mut self.changes);
        let kept_first = (random.below(2) == 0).then(|| random.below(changes.len() as u64 + 1) as usize);
        for (at, change) in changes.into_iter().enumerate() {
            let kept = match kept_first {
                Some(count) => at < count,
                None => random.below(2) == 0,
            };
            counters.count(if kept { Fault::NameKept } else { Fault::NameLost });
            if kept {
                apply(&mut self.durable, change);
            }
        }
        self.names = self.durable.clone();
    }
}

impl Tree {
    pub fn new() -> Self {
        Self { nodes: BTreeMap::from([(ROOT, Node::Dir(Dir::default()))]), next: ROOT + 1 }
    }

    fn child(&self, node: NodeId, name: &str) -> io::Result<Option<NodeId>> {
        match self.nodes.get(&node) {
            Some(Node::Dir(dir)) => Ok(dir.names.get(name).copied()),
            Some(Node::File(_)) => Err(errno(libc::ENOTDIR)),
            None => Ok(None),
        }
    }

    pub fn find(&self, path: &Path) -> io::Result<NodeId> {
        let mut node = ROOT;
        for part in path.components() {
            match part {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => {
                    let name = name.to_str().ok_or(errno(libc::EINVAL))?;
                    node = self.child(node, name)?.ok_or(errno(libc::ENOENT))?;
                }
                _ => return Err(errno(libc::EINVAL)),
            }
        }
        Ok(node)
    }

    /// The directory that holds the last name of `path`, and that name.
    fn place(&self, path: &Path) -> io::Result<(NodeId, String)> {
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(errno(libc::EINVAL))?;
        let parent = self.find(path.parent().unwrap_or(Path::new("/")))?;
        match self.nodes.get(&parent) {
            Some(Node::Dir(_)) => Ok((parent, name.to_owned())),
            _ => Err(errno(libc::ENOTDIR)),
        }
    }

    pub fn dir(&mut self, node: NodeId) -> io::Result<&mut Dir> {
        match self.nodes.get_mut(&node) {
            Some(Node::Dir(dir)) => Ok(dir),
            _ => Err(errno(libc::ENOTDIR)),
        }
    }

    pub fn file(&mut self, node: NodeId) -> io::Result<&mut Content> {
        match self.nodes.get_mut(&node) {
            Some(Node::File(content)) => Ok(content),
            Some(Node::Dir(_)) => Err(errno(libc::EISDIR)),
            None => Err(errno(libc::ENOENT)),
        }
    }

    pub fn is_dir(&self, node: NodeId) -> bool {
        matches!(self.nodes.get(&node), Some(Node::Dir(_)))
    }

    /// Length of a file, nothing of a directory.
    pub fn len(&self, node: NodeId) -> u64 {
        match self.nodes.get(&node) {
            Some(Node::File(content)) => content.len(),
            _ => 0,
        }
    }

    pub fn create(&mut self, path: &Path, node: Node) -> io::Result<NodeId> {
        let (parent, name) = self.place(path)?;
        let id = self.next;
        let dir = self.dir(parent)?;
        if dir.names.contains_key(&name) {
            return Err(errno(libc::EEXIST));
        }
        dir.change(Change::Link(name, id));
        self.next += 1;
        self.nodes.insert(id, node);
        Ok(id)
    }

    /// `dir`: what the caller takes the name for.
    pub fn remove(&mut self, path: &Path, dir: bool) -> io::Result<()> {
        let (parent, name) = self.place(path)?;
        let node = self.child(parent, &name)?.ok_or(errno(libc::ENOENT))?;
        match self.nodes.get(&node) {
            Some(Node::Dir(found)) if dir && !found.names.is_empty() => return Err(errno(libc::ENOTEMPTY)),
            Some(Node::Dir(_)) if !dir => return Err(errno(libc::EISDIR)),
            Some(Node::File(_)) if dir => return Err(errno(libc::ENOTDIR)),
            _ => {}
        }
        self.dir(parent)?.change(Change::Unlink(name));
        Ok(())
    }

    /// Both in one directory.
    pub fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let (parent, from) = self.place(from)?;
        let (_, to) = self.place(to)?;
        let node = self.child(parent, &from)?.ok_or(errno(libc::ENOENT))?;
        if from == to {
            return Ok(());
        }
        if let Some(replaced) = self.child(parent, &to)? {
            match (self.nodes.get(&node), self.nodes.get(&replaced)) {
                (Some(Node::Dir(_)), Some(Node::Dir(old))) if old.names.is_empty() => {}
                (Some(Node::Dir(_)), Some(Node::Dir(_))) => return Err(errno(libc::ENOTEMPTY)),
                (Some(Node::Dir(_)), _) => return Err(errno(libc::ENOTDIR)),
                (_, Some(Node::Dir(_))) => return Err(errno(libc::EISDIR)),
                _ => {}
            }
        }
        self.dir(parent)?.change(Change::Rename(from, to, node));
        Ok(())
    }

    pub fn list(&self, node: NodeId) -> io::Result<Vec<(String, NodeId)>> {
        match self.nodes.get(&node) {
            Some(Node::Dir(dir)) => Ok(dir.names.iter().map(|(name, node)| (name.clone(), *node)).collect()),
            _ => Err(errno(libc::ENOTDIR)),
        }
    }

    pub fn sync_all(&mut self) {
        for node in self.nodes.values_mut() {
            match node {
                Node::File(content) => content.sync(),
                Node::Dir(dir) => dir.sync(),
            }
        }
    }

    /// Files that some name leads to, in an order that does not depend on anything but history.
    pub fn files(&self) -> Vec<NodeId> {
        self.reachable()
            .into_iter()
            .filter(|node| matches!(self.nodes.get(node), Some(Node::File(_))))
            .collect()
    }

    fn reachable(&self) -> BTreeSet<NodeId> {
        let mut found = BTreeSet::from([ROOT]);
        let mut open = vec![ROOT];
        while let Some(node) = open.pop() {
            if let Some(Node::Dir(dir)) = self.nodes.get(&node) {
                for child in dir.names.values() {
                    if found.insert(*child) {
                        open.push(*child);
                    }
                }
            }
        }
        found
    }

    /// Decides names first: a file that nobody finds again needs no fate.
    pub fn lose_power(&mut self, random: &mut Random, counters: &mut Counters) {
        for node in self.nodes.values_mut() {
            if let Node::Dir(dir) = node {
                dir.lose_power(random, counters);
            }
        }
        self.forget_unreachable();
    }

    /// After a crash no handle is left, and nodes without a name are gone. A killed process leaves names unsynced, so
    /// what these may bring back stays too.
    pub fn forget_unreachable(&mut self) {
        let mut kept = self.reachable();
        let mut open: Vec<NodeId> = kept.iter().copied().collect();
        while let Some(node) = open.pop() {
            if let Some(Node::Dir(dir)) = self.nodes.get(&node) {
                let changed = dir.changes.iter().filter_map(|change| match change {
                    Change::Link(_, node) | Change::Rename(_, _, node) => Some(node),
                    Change::Unlink(_) => None,
                });
                for child in dir.names.values().chain(dir.durable.values()).chain(changed) {
                    if kept.insert(*child) {
                        open.push(*child);
                    }
                }
            }
        }
        self.nodes.retain(|node, _| kept.contains(node));
    }

    /// A name of the node; empty when none leads there.
    pub fn path(&self, wanted: NodeId) -> PathBuf {
        let mut open = vec![(PathBuf::from("/"), ROOT)];
        while let Some((path, node)) = open.pop() {
            if node == wanted {
                return path;
            }
            if let Some(Node::Dir(dir)) = self.nodes.get(&node) {
                open.extend(dir.names.iter().map(|(name, child)| (path.join(name), *child)));
            }
        }
        PathBuf::new()
    }

    pub fn pages(&self) -> u64 {
        self.reachable().into_iter().map(|node| self.charge(node)).sum()
    }

    /// A page for itself and those of its content.
    pub fn charge(&self, node: NodeId) -> u64 {
        match self.nodes.get(&node) {
            Some(Node::File(content)) => 1 + content.charge(),
            _ => 1,
        }
    }

    pub fn each_file(&mut self, mut with: impl FnMut(&mut Content)) {
        for node in self.nodes.values_mut() {
            if let Node::File(content) = node {
                with(content);
            }
        }
    }
}
