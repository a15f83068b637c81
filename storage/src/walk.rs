//! Walking batch headers in a piece of a segment. Pure; every claim of a header is checked against the piece.

use flumen_protocol::record_batch::{self, BatchHeader, HEADER_BYTES};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A whole batch: its header and its place in the piece.
    Batch(BatchHeader, usize),
    /// The piece ends inside a batch; this many bytes from its start would be needed (a header at least).
    Short(usize),
    Damaged(String),
    End,
}

/// Batches of a piece that is supposed to begin with the batch at `offset`, or, in a compacted segment, with the first one
/// that is left from there on.
#[derive(Debug)]
pub struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    offset: i64,
    holes_to: Option<i64>,
}

impl<'a> Walk<'a> {
    pub fn new(bytes: &'a [u8], offset: i64) -> Self {
        Self { bytes, at: 0, offset, holes_to: None }
    }

    /// As `new`; with `holes_to`, offsets may be missing between batches, all of which end there or before.
    pub fn with_holes(bytes: &'a [u8], offset: i64, holes_to: Option<i64>) -> Self {
        Self { bytes, at: 0, offset, holes_to }
    }

    pub fn at(&self) -> usize {
        self.at
    }

    /// Offset that the next batch must have, or, where there are holes, the lowest that it can have.
    pub fn offset(&self) -> i64 {
        self.offset
    }

    pub fn step(&mut self) -> Step {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return Step::End;
        }
        if rest.len() < HEADER_BYTES {
            return Step::Short(HEADER_BYTES);
        }
        let header = match record_batch::parse_header(rest) {
            Ok(header) => header,
            Err(error) => {
                return Step::Damaged(format!("no batch where offset {} should be: {error}", self.offset));
            }
        };
        let fits = match self.holes_to {
            None => header.base_offset == self.offset,
            Some(end) => header.base_offset >= self.offset && header.next_offset() <= end,
        };
        if !fits {
            return Step::Damaged(format!(
                "batch with offset {} where offset {} should be",
                header.base_offset, self.offset
            ));
        }
        let total = header.total_bytes();
        if total > rest.len() {
            return Step::Short(total);
        }
        let at = self.at;
        self.at += total;
        self.offset = header.next_offset();
        Step::Batch(header, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flumen_protocol::record::BatchBuilder;
    use proptest::prelude::*;

    fn two() -> Vec<u8> {
        let mut out = Vec::new();
        for base in [10, 12] {
            let mut builder = BatchBuilder::new();
            for k in 0..2 {
                builder.append(base + k, None, Some(b"value"), &[]);
            }
            out.extend_from_slice(&builder.build(base));
        }
        out
    }

    #[test]
    fn walks_and_stops() {
        let bytes = two();
        let half = bytes.len() / 2;
        let mut walk = Walk::new(&bytes, 10);
        assert!(matches!(walk.step(), Step::Batch(h, 0) if h.next_offset() == 12));
        assert!(matches!(walk.step(), Step::Batch(h, at) if h.base_offset == 12 && at == half));
        assert_eq!((walk.step(), walk.offset()), (Step::End, 14));
        let mut walk = Walk::new(&bytes[..bytes.len() - 1], 10);
        walk.step();
        assert_eq!(walk.step(), Step::Short(half));
        assert!(matches!(Walk::new(&bytes, 11).step(), Step::Damaged(_)));
    }

    #[test]
    fn holes_are_taken_and_nothing_else() {
        let bytes = two();
        let mut walk = Walk::with_holes(&bytes, 4, Some(20));
        assert!(matches!(walk.step(), Step::Batch(h, 0) if h.base_offset == 10));
        assert!(matches!(walk.step(), Step::Batch(..)));
        assert_eq!((walk.step(), walk.offset()), (Step::End, 14));
        assert!(matches!(Walk::with_holes(&bytes, 11, Some(20)).step(), Step::Damaged(_)));
        let mut short = Walk::with_holes(&bytes, 10, Some(13));
        assert!(matches!(short.step(), Step::Batch(..)));
        assert!(matches!(short.step(), Step::Damaged(_)), "beyond its end");
        let backwards = [&bytes[bytes.len() / 2..], &bytes[..bytes.len() / 2]].concat();
        let mut walk = Walk::with_holes(&backwards, 0, Some(20));
        walk.step();
        assert!(matches!(walk.step(), Step::Damaged(_)), "offsets rise");
    }

    proptest! {
        #[test]
        fn random_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), offset in any::<i64>()) {
            let mut walk = Walk::new(&bytes, offset);
            while matches!(walk.step(), Step::Batch(..)) {}
        }
    }
}
