//! Names of segment files, and which of the files of a partition count. Pure.
//!
//! `<base>.log` is a segment as it was written: its batches follow each other without a gap, up to the base of the next
//! one. `<base>.<end>.<generation>.<crc>.log` is one that compaction wrote: it stands for all offsets from `base` to
//! `end`, some of which it no longer has. It got that name when it was complete and synced, so it replaces everything
//! that lies in its range and is older (a plain one, or one of a lower generation), whether that is still there or not.

use std::fmt;

/// What the name of a compacted segment says. Its content never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Compacted {
    pub end: i64,
    /// Higher than that of everything it replaces.
    pub generation: u32,
    /// crc32c of the whole file.
    pub crc: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentName {
    pub base: i64,
    pub compacted: Option<Compacted>,
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:020}", self.base)?;
        match self.compacted {
            None => Ok(()),
            Some(Compacted { end, generation, crc }) => write!(f, ".{end:020}.{generation}.{crc:08x}"),
        }
    }
}

impl SegmentName {
    pub fn plain(base: i64) -> Self {
        Self { base, compacted: None }
    }

    pub fn log_file(&self) -> String {
        format!("{self}.log")
    }

    pub fn index_file(&self) -> String {
        format!("{self}.idx")
    }

    /// Up to where offsets may be missing between its batches; `None`: nowhere.
    pub fn holes_to(&self) -> Option<i64> {
        self.compacted.map(|compacted| compacted.end)
    }

    /// Reads the name of a `.log` file; `None` for what is no segment.
    pub fn parse(file_name: &str) -> Option<Self> {
        let mut words = file_name.strip_suffix(".log")?.split('.');
        let base = words.next()?.parse::<i64>().ok().filter(|base| *base >= 0)?;
        let Some(end) = words.next() else { return Some(Self::plain(base)) };
        let compacted = Compacted {
            end: end.parse().ok().filter(|end| *end > base)?,
            generation: words.next()?.parse().ok()?,
            crc: u32::from_str_radix(words.next()?, 16).ok()?,
        };
        words.next().is_none().then_some(Self { base, compacted: Some(compacted) })
    }
}

/// Divides the segments that a directory has, each with what is known of it, into those that count, by rising base, and
/// those that compaction has replaced and that a crash left over.
pub fn choose<T>(mut found: Vec<(SegmentName, T)>) -> (Vec<(SegmentName, T)>, Vec<SegmentName>) {
    // Newest first; plain ones are the oldest, and replace nothing.
    found.sort_by_key(|(name, _)| {
        let generation = name.compacted.map_or(0, |compacted| u64::from(compacted.generation) + 1);
        (std::cmp::Reverse(generation), name.base)
    });
    let mut compacted: Vec<(i64, i64)> = Vec::new();
    let mut kept = Vec::new();
    let mut replaced = Vec::new();
    for (name, known) in found {
        let end = name.holes_to().unwrap_or(name.base + 1);
        if compacted.iter().any(|(newer_base, newer_end)| name.base < *newer_end && *newer_base < end) {
            replaced.push(name);
            continue;
        }
        compacted.extend(name.holes_to().map(|end| (name.base, end)));
        kept.push((name, known));
    }
    kept.sort_by_key(|(name, _)| name.base);
    (kept, replaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(found: &[SegmentName]) -> (Vec<SegmentName>, Vec<SegmentName>) {
        let (kept, replaced) = super::choose(found.iter().map(|name| (*name, ())).collect());
        (kept.into_iter().map(|(name, ())| name).collect(), replaced)
    }

    fn compacted(base: i64, end: i64, generation: u32) -> SegmentName {
        SegmentName { base, compacted: Some(Compacted { end, generation, crc: 0xdead_beef }) }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in [SegmentName::plain(0), SegmentName::plain(1 << 40), compacted(7, 1 << 50, 3)] {
            assert_eq!(SegmentName::parse(&name.log_file()), Some(name));
        }
        assert_eq!(SegmentName::plain(5).log_file(), "00000000000000000005.log");
        assert_eq!(
            compacted(5, 9, 2).index_file(),
            "00000000000000000005.00000000000000000009.2.deadbeef.idx"
        );
        for no in
            ["5.idx", "x.log", "-5.log", "5.5.1.0.log", "5.9.1.log", "5.9.x.0.log", "5.9.1.0.0.log", ".log"]
        {
            assert_eq!(SegmentName::parse(no), None, "{no}");
        }
    }

    #[test]
    fn the_newest_of_a_range_counts() {
        let plain = |base| SegmentName::plain(base);
        // Cut short before the replaced ones were removed.
        let (kept, replaced) = choose(&[plain(0), plain(10), compacted(0, 20, 1), plain(20)]);
        assert_eq!(kept, [compacted(0, 20, 1), plain(20)]);
        assert_eq!(replaced, [plain(0), plain(10)]);
        // Compacted again, and joined with another.
        let all = [compacted(0, 20, 1), compacted(20, 30, 2), compacted(0, 30, 3), plain(20), plain(30)];
        assert_eq!(choose(&all).0, [compacted(0, 30, 3), plain(30)]);
        assert_eq!(choose(&[compacted(0, 20, 4), compacted(0, 20, 5)]).0, [compacted(0, 20, 5)]);
        assert_eq!(choose(&[plain(3), plain(1)]), (vec![plain(1), plain(3)], vec![]));
    }
}
