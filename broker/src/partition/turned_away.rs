//! Batches of idempotent producers that were turned away and will come again, so that what follows them in a producer's
//! pipeline is turned away, too.
//!
//! A client has several requests in flight. When one of them is refused for the moment (the leadership is handed over, the
//! others do not keep up, the disk is full) and a later one is not, the later one is a gap: a known producer would hear
//! OUT_OF_ORDER_SEQUENCE_NUMBER, upon which librdkafka begins a new epoch and sends again what it has no answer for, stored
//! or not; and an unknown producer would begin with it, for good. So after a refusal everything behind it hears the same, until
//! the first of what was refused comes again.
//!
//! Pure. It is memory of what clients are about to do, not state: whoever forgets it answers as Kafka does.

use std::collections::BTreeMap;

use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::record_batch::{self, BatchHeader};

/// A client sends again after its back-off and a look at the metadata, a second or two; one that has given a batch up must
/// hear of the gap at last.
pub(super) const HOLD_MS: i64 = 10_000;
/// Of one partition. The one that waits longest makes room.
const PRODUCERS_MAX: usize = 1000;

/// Where a batch stands among those of its producer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    producer_id: i64,
    epoch: i16,
    sequence: i32,
}

impl Place {
    pub(super) fn of(records: &[u8]) -> Option<Place> {
        Place::of_header(&record_batch::parse_header(records).ok()?)
    }

    pub(super) fn of_header(header: &BatchHeader) -> Option<Place> {
        let numbered = header.has_producer_id() && header.base_sequence >= 0;
        numbered.then_some(Place {
            producer_id: header.producer_id,
            epoch: header.producer_epoch,
            sequence: header.base_sequence,
        })
    }
}

/// Sequences start over after `i32::MAX`; whatever is less than half the way ahead comes after.
pub(super) fn comes_after(sequence: i32, other: i32) -> bool {
    let ahead = sequence.wrapping_sub(other) & i32::MAX;
    ahead != 0 && ahead < 1 << 30
}

#[derive(Clone, Copy, Debug)]
struct Missing {
    epoch: i16,
    sequence: i32,
    code: ErrorCode,
    /// When a batch was first measured by it.
    since_ms: Option<i64>,
}

#[derive(Default)]
pub(super) struct TurnedAway {
    missing: BTreeMap<i64, Missing>,
}

impl TurnedAway {
    /// As nearly always: nobody has to wait for anybody.
    pub(super) fn is_empty(&self) -> bool {
        self.missing.is_empty()
    }

    /// The batch heard this error and comes again. Of several of a producer the first is what counts.
    pub(super) fn note(&mut self, place: Place, code: ErrorCode) {
        let Place { producer_id, epoch, sequence } = place;
        match self.missing.get(&producer_id) {
            Some(known) if known.epoch > epoch => return,
            Some(known) if known.epoch == epoch && comes_after(sequence, known.sequence) => return,
            Some(_) => {}
            None if self.missing.len() < PRODUCERS_MAX => {}
            None => {
                let longest = self.missing.iter().min_by_key(|(_, m)| m.since_ms.unwrap_or(i64::MAX));
                if let Some(id) = longest.map(|(id, _)| *id) {
                    self.missing.remove(&id);
                }
            }
        }
        self.missing.insert(producer_id, Missing { epoch, sequence, code, since_ms: None });
    }

    /// What a batch hears because one before it is missing. `stored` tells epoch and last sequence that the log has of a
    /// producer: what was missing may have come to another leader meanwhile.
    pub(super) fn must_hear(
        &mut self,
        place: Place,
        now_ms: i64,
        stored: impl FnOnce(i64) -> Option<(i16, i32)>,
    ) -> Option<ErrorCode> {
        let missing = self.missing.get_mut(&place.producer_id)?;
        let came = stored(place.producer_id).is_some_and(|(epoch, last)| {
            epoch > missing.epoch
                || (epoch == missing.epoch && last >= 0 && !comes_after(missing.sequence, last))
        });
        if came {
            self.missing.remove(&place.producer_id);
            return None;
        }
        let since_ms = *missing.since_ms.get_or_insert(now_ms);
        // A clock that was set back ends it, too.
        let holds = (0..HOLD_MS).contains(&now_ms.saturating_sub(since_ms));
        if !holds || place.epoch != missing.epoch {
            // A new epoch begins with a sequence of its own; one that is older is fenced, or was never stored.
            if !holds || place.epoch > missing.epoch {
                self.missing.remove(&place.producer_id);
            }
            return None;
        }
        comes_after(place.sequence, missing.sequence).then_some(missing.code)
    }

    /// The batch was taken: what follows it may be.
    pub(super) fn took(&mut self, place: Place) {
        let is_it = |m: &Missing| (m.epoch, m.sequence) == (place.epoch, place.sequence);
        if self.missing.get(&place.producer_id).is_some_and(is_it) {
            self.missing.remove(&place.producer_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: ErrorCode = ErrorCode::NOT_LEADER_OR_FOLLOWER;

    fn place(producer_id: i64, epoch: i16, sequence: i32) -> Place {
        Place { producer_id, epoch, sequence }
    }

    #[test]
    fn what_follows_hears_the_same_until_the_first_comes_again() {
        let mut away = TurnedAway::default();
        assert_eq!(away.must_hear(place(1, 0, 3), 0, |_| None), None);
        away.note(place(1, 0, 3), CODE);
        // Those behind it are refused as well, in any order, and change nothing.
        away.note(place(1, 0, 5), ErrorCode::KAFKA_STORAGE_ERROR);
        assert_eq!(away.must_hear(place(1, 0, 4), 0, |_| None), Some(CODE));
        assert_eq!(away.must_hear(place(1, 0, i32::MAX), 0, |_| None), None, "that is long before");
        assert_eq!(away.must_hear(place(2, 0, 4), 0, |_| None), None, "another producer");
        away.note(place(1, 0, 2), CODE);
        assert_eq!(away.must_hear(place(1, 0, 3), 0, |_| None), Some(CODE));
        away.took(place(1, 0, 3));
        assert_eq!(away.must_hear(place(1, 0, 3), 0, |_| None), Some(CODE));
        away.took(place(1, 0, 2));
        assert_eq!(away.must_hear(place(1, 0, 3), 0, |_| None), None);
    }

    #[test]
    fn what_came_to_another_leader_is_not_waited_for() {
        for (stored, waits) in [((0, 2), true), ((0, 3), false), ((0, 90), false), ((1, 0), false)] {
            let mut away = TurnedAway::default();
            away.note(place(1, 0, 3), CODE);
            assert_eq!(away.must_hear(place(1, 0, 91), 0, |_| Some(stored)).is_some(), waits, "{stored:?}");
        }
    }

    #[test]
    fn it_ends_with_the_epoch_and_with_time() {
        let mut away = TurnedAway::default();
        away.note(place(1, 4, 3), CODE);
        assert_eq!(away.must_hear(place(1, 3, 9), 0, |_| None), None);
        assert_eq!(away.must_hear(place(1, 4, 9), 1, |_| None), Some(CODE));
        away.note(place(1, 3, 1), CODE);
        assert_eq!(away.must_hear(place(1, 4, 9), HOLD_MS - 1, |_| None), Some(CODE));
        assert_eq!(away.must_hear(place(1, 4, 9), HOLD_MS, |_| None), None);
        away.note(place(1, 4, i32::MAX), CODE);
        assert_eq!(away.must_hear(place(1, 4, 0), 0, |_| None), Some(CODE), "sequences start over");
        assert_eq!(away.must_hear(place(1, 5, 0), 0, |_| None), None);
        assert_eq!(away.must_hear(place(1, 4, 0), 0, |_| None), None);
    }

    #[test]
    fn it_stays_small() {
        let mut away = TurnedAway::default();
        for id in 0..3 * PRODUCERS_MAX as i64 {
            away.note(place(id, 0, 0), CODE);
        }
        assert_eq!(away.missing.len(), PRODUCERS_MAX);
    }
}
