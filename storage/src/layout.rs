//! Where batches go in their segments, and when a new segment begins. Pure.
//!
//! A batch gets its place when it is staged, not when it is moved there: so a large one can be written to its segment
//! at once, ahead of smaller ones before it that are still in the WAL. What lies before it in the file is filled later,
//! and counts only then.

/// Positions are 32 bits wide.
const SEGMENT_BYTES_MAX: u64 = 2 << 30;

/// The rules of a topic.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub segment_bytes: u64,
    /// -1 for none.
    pub segment_ms: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Base offset of the segment.
    pub base: i64,
    pub position: u32,
    /// It is the first of its segment.
    pub starts: bool,
}

impl Place {
    /// Of an entry that has none.
    pub const NONE: Place = Place { base: -1, position: 0, starts: false };

    /// Where in the segment a batch of this size ends.
    pub fn end(&self, bytes: usize) -> u64 {
        u64::from(self.position) + bytes as u64
    }
}

/// The end of the log as it will be once everything staged is in segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// -1 before the first segment.
    base: i64,
    bytes: u64,
    /// Of the segment's first batch; -1 when unknown.
    first_timestamp: i64,
}

impl Layout {
    pub fn empty() -> Self {
        Self { base: -1, bytes: 0, first_timestamp: -1 }
    }

    pub fn resume(base: i64, bytes: u64, first_timestamp: i64) -> Self {
        Self { base, bytes, first_timestamp }
    }

    /// Base of the last segment (-1: none) and what it will hold.
    pub fn end(&self) -> (i64, u64) {
        (self.base, self.bytes)
    }

    /// Gives the batch at `offset` its place.
    pub fn place(&mut self, offset: i64, bytes: usize, timestamp: i64, limits: Limits) -> Place {
        let limit = limits.segment_bytes.min(SEGMENT_BYTES_MAX);
        let too_big = self.bytes > 0 && self.bytes + bytes as u64 > limit;
        let too_old = self.bytes > 0
            && limits.segment_ms >= 0
            && self.first_timestamp >= 0
            && timestamp.saturating_sub(self.first_timestamp) > limits.segment_ms;
        let starts = self.base < 0 || too_big || too_old;
        if starts {
            *self = Self::resume(offset, 0, timestamp);
        } else if self.bytes == 0 {
            self.first_timestamp = timestamp;
        }
        let position = u32::try_from(self.bytes).expect("a segment ends before its positions do");
        self.bytes += bytes as u64;
        Place { base: self.base, position, starts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_begin_by_size_and_age() {
        let limits = Limits { segment_bytes: 1000, segment_ms: 50 };
        let mut layout = Layout::empty();
        let mut place = |offset, bytes, time| {
            let place = layout.place(offset, bytes, time, limits);
            (place.base, place.position, place.starts)
        };
        assert_eq!(place(7, 400, 100), (7, 0, true));
        assert_eq!(place(9, 600, 110), (7, 400, false));
        assert_eq!(place(10, 1, 110), (10, 0, true));
        // One that is larger than a segment has one of its own.
        assert_eq!(place(11, 5000, 110), (11, 0, true));
        assert_eq!(place(12, 10, 110), (12, 0, true));
        assert_eq!(place(13, 10, 160), (12, 10, false));
        assert_eq!(place(14, 10, 161), (14, 0, true));
    }

    #[test]
    fn goes_on_where_a_segment_was_left() {
        let limits = Limits { segment_bytes: 1000, segment_ms: -1 };
        let mut layout = Layout::resume(5, 990, -1);
        assert_eq!(layout.place(20, 10, 1 << 40, limits), Place { base: 5, position: 990, starts: false });
        assert_eq!(layout.place(21, 1, 0, limits), Place { base: 21, position: 0, starts: true });
        // A segment that was made and got nothing.
        let mut layout = Layout::resume(5, 0, -1);
        assert_eq!(layout.place(5, 2000, 0, limits), Place { base: 5, position: 0, starts: false });
    }
}
