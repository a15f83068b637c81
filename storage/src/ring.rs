//! Where the next block of a lane goes, and whether there is room for it. Pure arithmetic over a ring of files.
//!
//! Files are numbered upwards for ever; file `n` lives in slot `n % files_max`. A file may be entered once the one that
//! had its slot before is retired.

/// Who asks. The last file of the ring keeps room for the records that retiring a file needs; without it a full ring
/// could never be emptied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Retirement and deletion: may use everything.
    System,
    /// An entry that Raft has accepted already.
    Stage,
}

/// Kept for entries accepted just before the ring got full, and for the no-ops and hard states of elections.
const STAGE_MARGIN_BYTES: u64 = 2 << 20;

/// A group state with a long name and some epochs.
const GROUP_STATE_BYTES: u64 = 512;

#[derive(Debug, Clone)]
pub struct Plan {
    file_bytes: u64,
    files_max: u64,
    system_reserve: u64,
    pub file_seq: u64,
    pub position: u64,
    pub oldest: u64,
}

impl Plan {
    pub fn new(file_bytes: u64, files_max: u64) -> Self {
        let mut plan = Self { file_bytes, files_max, system_reserve: 0, file_seq: 0, position: 0, oldest: 0 };
        plan.set_groups(0);
        plan
    }

    /// The reserve grows with the number of groups that a retirement may have to write about.
    pub fn set_groups(&mut self, groups: usize) {
        let want = (64 * 1024 + groups as u64 * GROUP_STATE_BYTES).next_multiple_of(4096);
        self.system_reserve = want.min(self.file_bytes / 2);
    }

    fn limit(&self, file_seq: u64, class: Class) -> u64 {
        if file_seq + 1 < self.oldest + self.files_max {
            return self.file_bytes;
        }
        let kept = match class {
            Class::System => 0,
            Class::Stage => self.system_reserve,
        };
        self.file_bytes.saturating_sub(kept)
    }

    /// Whether a block of the present file that begins at `start` may grow to `bytes`.
    pub fn may_grow(&self, start: u64, bytes: u64, class: Class) -> bool {
        start + bytes <= self.limit(self.file_seq, class)
    }

    /// Where a new block of `bytes` would go.
    pub fn place(&self, bytes: u64, class: Class) -> Option<(u64, u64)> {
        if self.position + bytes <= self.limit(self.file_seq, class) {
            return Some((self.file_seq, self.position));
        }
        let next = self.file_seq + 1;
        (next < self.oldest + self.files_max && bytes <= self.limit(next, class)).then_some((next, 0))
    }

    pub fn files_in_use(&self) -> u64 {
        self.file_seq + 1 - self.oldest
    }

    /// What must be left beside a new batch for it to be accepted.
    pub fn margin(&self) -> u64 {
        STAGE_MARGIN_BYTES.min(self.file_bytes / 8)
    }

    /// Largest block that fits a fresh ring for an entry.
    pub fn largest(&self) -> u64 {
        self.file_bytes - self.system_reserve - self.margin()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_up_in_classes() {
        let file = 4 << 20;
        let mut plan = Plan::new(file, 3);
        let mut placed = 0;
        while let Some((file_seq, position)) = plan.place(1 << 20, Class::Stage) {
            (plan.file_seq, plan.position) = (file_seq, position + (1 << 20));
            placed += 1;
        }
        assert_eq!((placed, plan.file_seq), (11, 2));
        // One megabyte is left, less the reserve.
        plan.position += 500 << 10;
        assert!(plan.place(256 << 10, Class::Stage).is_some());
        plan.position += 400 << 10;
        assert!(plan.place(100 << 10, Class::Stage).is_none());
        assert!(plan.place(100 << 10, Class::System).is_some());
        plan.oldest = 1;
        assert_eq!(plan.place(256 << 10, Class::Stage), Some((3, 0)));
        assert_eq!(plan.files_in_use(), 2);
    }
}
