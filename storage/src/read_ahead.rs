//! Where catch-up readers stopped, and what was read for them beyond that: the next read of one then needs no index, and
//! mostly no disk.
//!
//! One per shard, on its thread. A slot belongs to a place in a segment, not to a reader; whoever reads on from there takes
//! it. Small readers leave the rest of their piece. For one that reads on in large pieces the next piece is fetched while the
//! last one is on its way to it (`Coming`): a drain then waits for the slower of disk and socket, not for both in turn.
//! Bounds: slots, bytes left over, bytes fetched in advance. Slots of a group go when its segments are cut; what is
//! still coming then is dropped when it arrives.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::segment_name::SegmentName;
use crate::types::GroupId;

/// A few dozen bytes each.
const SLOTS_MAX: usize = 1024;
/// What was read for small readers beyond what they asked for, over all of them.
const LEFT_BYTES_MAX: usize = 8 << 20;
/// Fetched in advance, over all readers: two drains whose answers have 8 MiB, the largest that clients usually ask for.
const COMING_BYTES_MAX: usize = 16 << 20;
/// The oldest one makes room for another as long as most are used: readers that come round to a partition only after all that
/// fits has been fetched for others would have everything read twice. What was used adds one to the credit, what went
/// unused takes so many.
const CREDIT_MAX: usize = 16;
const UNUSED_COSTS: usize = 2;
/// Without credit, after so many that found no room one goes all the same: its reader may have gone away.
const REFUSALS_MAX: usize = 64;

pub(crate) struct Slot {
    pub group: GroupId,
    /// Segment, and where in it the batch at `offset` begins.
    pub segment: SegmentName,
    pub position: u64,
    pub offset: i64,
    pub rest: Rest,
}

pub(crate) enum Rest {
    /// Only the place is known.
    Place,
    /// From the place on.
    Here(Bytes),
    /// So many bytes from the place on, when they have been read.
    Coming(usize, oneshot::Receiver<io::Result<Bytes>>),
}

#[derive(Default)]
pub(crate) struct ReadAhead {
    slots: VecDeque<Slot>,
    credit: usize,
    refusals: usize,
}

impl ReadAhead {
    pub fn take(&mut self, group: GroupId, segment: SegmentName, offset: i64) -> Option<Slot> {
        let is_it = |slot: &Slot| slot.group == group && slot.segment == segment && slot.offset == offset;
        let at = self.slots.iter().position(is_it)?;
        let slot = self.slots.remove(at)?;
        if coming(&slot) > 0 {
            self.credit = (self.credit + 1).min(CREDIT_MAX);
        }
        Some(slot)
    }

    pub fn keep(&mut self, slot: Slot) {
        self.slots.push_back(slot);
        let left = |slot: &Slot| if let Rest::Here(bytes) = &slot.rest { bytes.len() } else { 0 };
        let mut bytes: usize = self.slots.iter().map(left).sum();
        while self.slots.len() > SLOTS_MAX || bytes > LEFT_BYTES_MAX {
            let Some(oldest) = self.slots.pop_front() else { break };
            bytes -= left(&oldest);
        }
    }

    /// Whether so much may be fetched in advance now. Makes room for it if it may.
    pub fn has_room(&mut self, bytes: usize) -> bool {
        let mut taken: usize = self.slots.iter().map(coming).sum();
        while taken + bytes > COMING_BYTES_MAX {
            if self.credit >= UNUSED_COSTS {
                self.credit -= UNUSED_COSTS;
            } else if self.refusals + 1 >= REFUSALS_MAX {
                self.refusals = 0;
            } else {
                self.refusals += 1;
                return false;
            }
            let Some(oldest) = self.slots.iter_mut().find(|slot| coming(slot) > 0) else { return false };
            taken -= coming(oldest);
            // Its reader still knows the place.
            oldest.rest = Rest::Place;
        }
        true
    }

    pub fn retain(&mut self, keep: impl FnMut(&Slot) -> bool) {
        let mut keep = keep;
        self.slots.retain(|slot| keep(slot));
    }
}

fn coming(slot: &Slot) -> usize {
    if let Rest::Coming(bytes, _) = slot.rest { bytes } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(group: GroupId, rest: Rest) -> Slot {
        Slot { group, segment: SegmentName::plain(0), position: 0, offset: 7, rest }
    }

    fn on_its_way(bytes: usize) -> Rest {
        Rest::Coming(bytes, oneshot::channel().1)
    }

    #[test]
    fn a_slot_is_taken_by_who_reads_on_there() {
        let mut ahead = ReadAhead::default();
        ahead.keep(slot(1, Rest::Place));
        assert!(ahead.take(2, SegmentName::plain(0), 7).is_none());
        assert!(ahead.take(1, SegmentName::plain(0), 8).is_none());
        assert!(ahead.take(1, SegmentName::plain(0), 7).is_some());
        assert!(ahead.take(1, SegmentName::plain(0), 7).is_none(), "it was taken");
    }

    #[test]
    fn what_is_left_over_is_bounded_and_the_oldest_goes() {
        let mut ahead = ReadAhead::default();
        for group in 0..5 {
            ahead.keep(slot(group, Rest::Here(Bytes::from(vec![0; LEFT_BYTES_MAX / 4]))));
        }
        assert!(ahead.take(0, SegmentName::plain(0), 7).is_none());
        assert!(ahead.take(1, SegmentName::plain(0), 7).is_some());
    }

    #[test]
    fn what_is_fetched_in_advance_is_bounded_and_does_not_stay_for_ever() {
        let mut ahead = ReadAhead::default();
        for group in 0..4 {
            assert!(ahead.has_room(COMING_BYTES_MAX / 4));
            ahead.keep(slot(group, on_its_way(COMING_BYTES_MAX / 4)));
        }
        let refused = (0..1_000).take_while(|_| !ahead.has_room(1)).count();
        assert_eq!(refused, REFUSALS_MAX - 1);
        let oldest = ahead.take(0, SegmentName::plain(0), 7).unwrap();
        assert!(matches!(oldest.rest, Rest::Place), "its reader still knows the place");
    }

    #[test]
    fn as_long_as_most_is_used_the_oldest_makes_room() {
        const EACH: usize = COMING_BYTES_MAX / 4;
        let mut ahead = ReadAhead::default();
        // As a reader whose partitions come and go one by one: three are read on with, the oldest is not.
        let fetch = |ahead: &mut ReadAhead, group| {
            let fits = ahead.has_room(EACH);
            if fits {
                ahead.keep(slot(group, on_its_way(EACH)));
            }
            fits
        };
        let mut refused = 0;
        for turn in 0..100 {
            for group in turn..turn + 4 {
                drop(ahead.take(group, SegmentName::plain(0), 7));
                refused += usize::from(!fetch(&mut ahead, group));
            }
        }
        assert!(refused < 200, "{refused}");
        // As one that comes round too late: nothing that was fetched is ever used, and soon nothing is fetched.
        let mut ahead = ReadAhead::default();
        let fetched = (0..1_000).filter(|group| fetch(&mut ahead, *group)).count();
        assert!(fetched < 4 + 1_000 / REFUSALS_MAX + 1, "{fetched}");
    }
}
