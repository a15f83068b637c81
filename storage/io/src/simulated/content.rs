//! The bytes of one simulated file: what a reader sees, what is surely on the disk, and what lies in between.
//!
//! Pure but for the `Fate` it is handed, which decides what a lost sector becomes. Bytes are kept in pages; a page that
//! was never written is absent, one that only ever got zeros costs no memory, and copies share theirs.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::faults::{Counters, Fault, Rates};
use super::random::Random;

pub const PAGE_BYTES: usize = 4096;

/// The smallest sector, in which coverage of a page is counted.
const PART_BYTES: usize = 512;

/// Versions of a page kept between two syncs, beside the oldest and the newest: any of them may be what a crash leaves.
const VERSIONS_KEPT: usize = 3;

static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Page {
    Zero,
    Data(Arc<[u8; PAGE_BYTES]>),
}

impl Page {
    pub fn bytes(&self) -> &[u8; PAGE_BYTES] {
        match self {
            Page::Zero => &ZEROS,
            Page::Data(bytes) => bytes,
        }
    }

    fn of(bytes: &[u8; PAGE_BYTES]) -> Page {
        if *bytes == ZEROS { Page::Zero } else { Page::Data(Arc::new(*bytes)) }
    }

    /// The page with `bytes` at `at`.
    fn with(page: Option<&Page>, at: usize, bytes: &[u8]) -> Page {
        if let Ok(whole) = <&[u8; PAGE_BYTES]>::try_from(bytes) {
            return Page::of(whole);
        }
        let mut new = *page.map_or(&ZEROS, Page::bytes);
        new[at..at + bytes.len()].copy_from_slice(bytes);
        Page::of(&new)
    }
}

#[derive(Debug, Clone, Default)]
struct Image {
    pages: BTreeMap<u64, Page>,
    len: u64,
}

impl Image {
    fn bytes(&self, page: u64) -> &[u8; PAGE_BYTES] {
        self.pages.get(&page).map_or(&ZEROS, Page::bytes)
    }

    fn set(&mut self, page: u64, content: Option<Page>) {
        match content {
            Some(content) => self.pages.insert(page, content),
            None => self.pages.remove(&page),
        };
    }

    /// Nothing of the file may come back when it grows again.
    fn cut(&mut self, len: u64) {
        self.pages.split_off(&len.div_ceil(PAGE_BYTES as u64));
        let last = len / PAGE_BYTES as u64;
        let keep = (len % PAGE_BYTES as u64) as usize;
        if keep > 0
            && let Some(page) = self.pages.get(&last)
        {
            let page = Page::with(Some(page), keep, &ZEROS[keep..]);
            self.pages.insert(last, page);
        }
        self.len = len;
    }
}

/// Decides what becomes of what was not synced.
pub struct Fate<'a> {
    pub random: &'a mut Random,
    pub rates: &'a Rates,
    pub counters: &'a mut Counters,
    /// 512 or 4096: what the disk writes as one, so what is old or new as one.
    pub sector_bytes: usize,
    /// In thousandths: how many of the sound sectors are new. Some crashes keep nearly everything, some nearly nothing.
    pub new_per_mille: u64,
    /// Pages written lately: what a sector full of garbage may look like.
    pub stale: &'a [Page],
}

/// How many bytes in front of a sector all of `since` leave as they were: an append writes the last block again with what
/// it held in front, as the page cache would do for it. To the disk that is the same as leaving those bytes alone.
fn left_in_front<'a>(old: &[u8], since: impl Iterator<Item = &'a [u8]>) -> usize {
    let same = |new: &[u8]| old.iter().zip(new).take_while(|(old, new)| old == new).count();
    since.map(same).min().unwrap_or(old.len())
}

impl Fate<'_> {
    /// `shared`: parts of the page that a write since the last sync did not cover.
    fn page(&mut self, old: &[u8; PAGE_BYTES], since: &[&[u8; PAGE_BYTES]], shared: u8) -> Page {
        let mut out = *old;
        for at in (0..PAGE_BYTES).step_by(self.sector_bytes) {
            let range = at..at + self.sector_bytes;
            let newest = since.last().map_or(old, |page| page);
            if newest[range.clone()] == old[range.clone()]
                && since.iter().all(|page| page[range.clone()] == old[range.clone()])
            {
                continue;
            }
            let new = if self.random.below(4) == 0 {
                self.random.pick(since).map_or(newest, |page| page)
            } else {
                newest
            };
            // Disks write a sector as one, so what a write left as it was in a sector survives; but see `Rates::ruins`.
            let parts = at / PART_BYTES..(at + self.sector_bytes) / PART_BYTES;
            let holds_more = parts.into_iter().any(|part| shared & (1 << part) != 0)
                && old[range.clone()] != ZEROS[range.clone()];
            let ruined = self.random.chance(self.rates.ruins);
            let (zero, garbage) =
                if holds_more && !ruined { (0, 0) } else { (self.rates.zero, self.rates.garbage) };
            let kept = left_in_front(&old[range.clone()], since.iter().map(|page| &page[range.clone()]));
            let lost = if ruined { 0..self.sector_bytes } else { kept..self.sector_bytes };
            let sector = &mut out[range.clone()];
            if self.random.chance(self.rates.torn) {
                self.counters.count(Fault::SectorTorn);
                let tear = 1 + self.random.below(self.sector_bytes as u64 - 1) as usize;
                let part = if self.random.below(2) == 0 { 0..tear } else { tear..self.sector_bytes };
                sector[part.clone()].copy_from_slice(&new[at + part.start..at + part.end]);
            } else if self.random.chance(zero) {
                self.counters.count(Fault::SectorZero);
                sector[lost].fill(0);
            } else if self.random.chance(garbage) {
                self.counters.count(Fault::SectorGarbage);
                match self.random.pick(self.stale) {
                    Some(page) if self.random.below(2) == 0 => {
                        sector[lost.clone()].copy_from_slice(&page.bytes()[range.clone()][lost]);
                    }
                    _ => sector[lost].chunks_mut(8).for_each(|chunk| {
                        chunk.copy_from_slice(&self.random.draw().to_le_bytes()[..chunk.len()]);
                    }),
                }
            } else if self.random.below(1000) < self.new_per_mille {
                self.counters.count(Fault::SectorNew);
                sector.copy_from_slice(&new[range.clone()]);
            } else {
                self.counters.count(Fault::SectorOld);
            }
        }
        Page::of(&out)
    }

    fn length(&mut self, durable: u64, since: &[u64]) -> u64 {
        let newest = since.last().copied().unwrap_or(durable);
        if since.is_empty() || self.random.below(1000) < self.new_per_mille {
            return newest;
        }
        let chosen = match self.random.below(1 + since.len() as u64) {
            0 => durable,
            at => since.get(at as usize - 1).copied().unwrap_or(durable),
        };
        if chosen != newest {
            self.counters.count(Fault::LengthLost);
        }
        chosen
    }
}

#[derive(Debug, Clone, Default)]
struct Dirty {
    /// What the page was in between.
    versions: Vec<Page>,
    /// Parts that some write left as they were, a bit each.
    shared: u8,
}

#[derive(Debug, Clone, Default)]
pub struct Content {
    current: Image,
    durable: Image,
    /// Pages changed since the last sync.
    dirty: BTreeMap<u64, Dirty>,
    /// Lengths since the last sync.
    lengths: Vec<u64>,
    /// Pages that have their place on the disk, written or not.
    reserved: u64,
    /// How often something was made durable.
    syncs: u64,
}

/// What a sync that has begun will have made durable when it ends. Writes in between are not covered.
#[derive(Debug)]
pub struct SyncPoint {
    pages: Vec<(u64, Option<Page>)>,
    len: u64,
    lengths: usize,
    syncs: u64,
}

impl Content {
    pub fn len(&self) -> u64 {
        self.current.len
    }

    /// Pages this file takes on the disk.
    pub fn charge(&self) -> u64 {
        self.reserved + self.current.pages.range(self.reserved..).count() as u64
    }

    /// Pages that a write would take in addition.
    pub fn extra_charge(&self, at: u64, len: usize) -> u64 {
        pages(at, len).filter(|page| *page >= self.reserved && !self.current.pages.contains_key(page)).count()
            as u64
    }

    pub fn read(&self, at: u64, out: &mut [u8]) -> usize {
        let len = usize::try_from(self.current.len.saturating_sub(at)).unwrap_or(usize::MAX).min(out.len());
        let mut done = 0;
        while done < len {
            let position = at + done as u64;
            let within = (position % PAGE_BYTES as u64) as usize;
            let take = (PAGE_BYTES - within).min(len - done);
            let page = self.current.bytes(position / PAGE_BYTES as u64);
            out[done..done + take].copy_from_slice(&page[within..within + take]);
            done += take;
        }
        len
    }

    /// The page is about to change from `from` to `to`.
    fn touch(&mut self, page: u64, from: usize, to: usize) {
        let covered = |part: usize| from <= part * PART_BYTES && (part + 1) * PART_BYTES <= to;
        let shared = (0..PAGE_BYTES / PART_BYTES)
            .filter(|part| !covered(*part))
            .fold(0, |mask, part| mask | 1 << part);
        let before = self.current.pages.get(&page);
        match self.dirty.get_mut(&page) {
            None => {
                self.dirty.insert(page, Dirty { versions: Vec::new(), shared });
            }
            Some(dirty) => {
                dirty.shared |= shared;
                dirty.versions.extend(before.cloned());
                if dirty.versions.len() > VERSIONS_KEPT {
                    dirty.versions.remove(0);
                }
            }
        }
    }

    /// `durable`: past every cache before it returns.
    pub fn write(&mut self, at: u64, bytes: &[u8], durable: bool) {
        let mut done = 0;
        while done < bytes.len() {
            let position = at + done as u64;
            let page = position / PAGE_BYTES as u64;
            let within = (position % PAGE_BYTES as u64) as usize;
            let take = (PAGE_BYTES - within).min(bytes.len() - done);
            self.touch(page, within, within + take);
            let new = Page::with(self.current.pages.get(&page), within, &bytes[done..done + take]);
            if durable {
                self.syncs += 1;
                self.dirty.remove(&page);
                self.durable.pages.insert(page, new.clone());
            }
            self.current.pages.insert(page, new);
            done += take;
        }
        let end = at + bytes.len() as u64;
        if end > self.current.len {
            self.current.len = end;
            self.lengths.push(end);
        }
        if durable && !self.lengths.is_empty() {
            self.lengths.clear();
            self.durable.cut(self.current.len);
        }
    }

    pub fn set_len(&mut self, len: u64) {
        if len == self.current.len {
            return;
        }
        let gone: Vec<u64> =
            self.current.pages.range(len / PAGE_BYTES as u64..).map(|(page, _)| *page).collect();
        for page in gone {
            self.touch(page, PAGE_BYTES, PAGE_BYTES);
        }
        if len < self.current.len {
            self.current.cut(len);
        }
        self.current.len = len;
        self.reserved = self.reserved.min(len.div_ceil(PAGE_BYTES as u64));
        self.lengths.push(len);
    }

    pub fn reserve(&mut self, len: u64) {
        self.reserved = self.reserved.max(len.div_ceil(PAGE_BYTES as u64));
        if len > self.current.len {
            self.set_len(len);
        }
    }

    pub fn written_until(&self) -> u64 {
        let mut page = 0;
        for written in self.current.pages.keys() {
            if *written != page {
                break;
            }
            page += 1;
        }
        (page * PAGE_BYTES as u64).min(self.current.len)
    }

    pub fn begin_sync(&self) -> SyncPoint {
        let pages = self.dirty.keys().map(|page| (*page, self.current.pages.get(page).cloned())).collect();
        SyncPoint { pages, len: self.current.len, lengths: self.lengths.len(), syncs: self.syncs }
    }

    pub fn end_sync(&mut self, point: SyncPoint) {
        if point.syncs != self.syncs {
            // Another sync ended meanwhile; to tell what is newer than what, both count for everything.
            return self.sync();
        }
        self.syncs += 1;
        for (page, content) in point.pages {
            if self.current.pages.get(&page) == content.as_ref() {
                self.dirty.remove(&page);
            }
            self.durable.set(page, content);
        }
        self.lengths.drain(..point.lengths);
        self.durable.cut(point.len);
    }

    pub fn sync(&mut self) {
        self.syncs += 1;
        for page in std::mem::take(&mut self.dirty).into_keys() {
            let now = self.current.pages.get(&page).cloned();
            self.durable.set(page, now);
        }
        self.lengths.clear();
        self.durable.cut(self.current.len);
    }

    /// A sync that failed: the pages count as clean, and what the disk has of them is anybody's guess. Readers go on
    /// seeing the new bytes.
    pub fn lose_sync(&mut self, fate: &mut Fate<'_>) {
        self.syncs += 1;
        for (page, dirty) in std::mem::take(&mut self.dirty) {
            let mut since: Vec<&[u8; PAGE_BYTES]> = dirty.versions.iter().map(Page::bytes).collect();
            since.push(self.current.bytes(page));
            let on_disk = fate.page(self.durable.bytes(page), &since, dirty.shared);
            if self.durable.pages.contains_key(&page) || on_disk != Page::Zero {
                self.durable.pages.insert(page, on_disk);
            }
        }
        let len = fate.length(self.durable.len, &std::mem::take(&mut self.lengths));
        self.durable.cut(len);
    }

    /// The machine lost its power.
    pub fn lose_power(&mut self, fate: &mut Fate<'_>) {
        self.lose_sync(fate);
        self.current = self.durable.clone();
        self.reserved = self.reserved.min(self.current.len.div_ceil(PAGE_BYTES as u64));
    }

    /// A write that a crash interrupted: each sector of it arrived or did not.
    pub fn write_partly(&mut self, at: u64, bytes: &[u8], durable: bool, fate: &mut Fate<'_>) {
        let mut new = self.clone_range(at, bytes.len());
        new.write(at, bytes, false);
        let mut mixed = Vec::with_capacity(bytes.len());
        for page in pages(at, bytes.len()) {
            let shared = new.dirty.get(&page).map_or(0, |dirty| dirty.shared);
            let page = fate.page(self.current.bytes(page), &[new.current.bytes(page)], shared);
            mixed.extend_from_slice(page.bytes());
        }
        let from = (at % PAGE_BYTES as u64) as usize;
        // A write behind the end makes the file longer as far as it came.
        let reached = if at + bytes.len() as u64 > self.current.len {
            fate.random.below(bytes.len() as u64 + 1) as usize
        } else {
            bytes.len()
        };
        if reached > 0 {
            self.write(at, &mixed[from..from + reached], durable);
        }
    }

    fn clone_range(&self, at: u64, len: usize) -> Content {
        let mut part = Content::default();
        for page in pages(at, len) {
            part.current.set(page, self.current.pages.get(&page).cloned());
        }
        part
    }

    /// Clean pages are read from the disk again, where a failed sync may have left something else.
    pub fn evict(&mut self, random: &mut Random, per_million: u32) -> u64 {
        let differs: Vec<u64> = self
            .current
            .pages
            .iter()
            .filter(|(page, content)| {
                !self.dirty.contains_key(page)
                    && *self.durable.pages.get(page).unwrap_or(&Page::Zero) != **content
            })
            .map(|(page, _)| *page)
            .collect();
        let mut evicted = 0;
        for page in differs {
            if random.chance(per_million) {
                let on_disk = self.durable.pages.get(&page).cloned();
                self.current.set(page, Some(on_disk.unwrap_or(Page::Zero)));
                evicted += 1;
            }
        }
        evicted
    }

    /// A page that is on the disk, for damage; `at` chooses among them.
    pub fn nth_page(&self, at: u64) -> Option<u64> {
        let count = self.durable.pages.len() as u64;
        self.durable.pages.keys().nth(usize::try_from(at.checked_rem(count)?).ok()?).copied()
    }

    /// Damages the disk; a reader sees it unless the page waits to be written.
    pub fn damage(&mut self, page: u64, change: impl FnOnce(&mut [u8; PAGE_BYTES])) {
        let mut bytes = *self.durable.bytes(page);
        change(&mut bytes);
        let damaged = Page::of(&bytes);
        if !self.dirty.contains_key(&page) && self.current.pages.contains_key(&page) {
            self.current.pages.insert(page, damaged.clone());
        }
        self.durable.pages.insert(page, damaged);
    }

    /// The cache believes that these pages are on the disk; they went elsewhere.
    pub fn forget_dirty(&mut self, at: u64, len: usize) {
        for page in pages(at, len) {
            self.dirty.remove(&page);
        }
    }

    pub fn page(&self, page: u64) -> Page {
        self.current.pages.get(&page).cloned().unwrap_or(Page::Zero)
    }
}

pub fn pages(at: u64, len: usize) -> std::ops::Range<u64> {
    let end = (at + len as u64).div_ceil(PAGE_BYTES as u64);
    at / PAGE_BYTES as u64..if len == 0 { at / PAGE_BYTES as u64 } else { end }
}
