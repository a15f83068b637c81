//! When a log is compacted, and which part of it. Pure: segments, settings and the time come in, a range goes out.
//!
//! As Kafka: the part below the clean offset was compacted before, the dirty part reaches from there to the first segment
//! that must not be touched. It is due when it makes more than the wanted share of both, or when its oldest record has
//! waited for longer than it may.

use crate::types::CompactionConfig;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    pub base: i64,
    pub end: i64,
    pub bytes: u64,
    /// Timestamps of its first and of its newest record, where they are known.
    pub oldest_ms: Option<i64>,
    pub newest_ms: Option<i64>,
}

/// `segments`: all that may be replaced, by rising base. `limit`: nothing that reaches above it is touched (the high
/// watermark, what an export holds). Returns the offset up to which the log is to be compacted now.
pub fn due(
    segments: &[Candidate],
    clean_offset: i64,
    limit: i64,
    config: &CompactionConfig,
    now_ms: i64,
) -> Option<i64> {
    let (mut clean, mut dirty, mut upper) = (0u64, 0u64, None);
    let mut waited_too_long = false;
    for segment in segments {
        if segment.end <= clean_offset {
            clean += segment.bytes;
            continue;
        }
        // One that nobody can tell the age of is as young as can be.
        let too_young = config.min_lag_ms > 0
            && segment.newest_ms.is_none_or(|newest| newest > now_ms.saturating_sub(config.min_lag_ms));
        if segment.end > limit || too_young {
            break;
        }
        dirty += segment.bytes;
        upper = Some(segment.end);
        waited_too_long |=
            segment.oldest_ms.is_some_and(|oldest| now_ms.saturating_sub(oldest) > config.max_lag_ms);
    }
    let share = u128::from(dirty) * 1000 > u128::from(config.min_dirty_permille) * u128::from(clean + dirty);
    upper.filter(|_| share || waited_too_long)
}

/// Whether the next segment is added to a rewritten one that begins at `base` and has `bytes` so far: all that it may leave
/// fits in, and so do its offsets into the 31 bits that Kafka's own tools count them with.
pub fn joins((base, bytes): (i64, u64), next: &Candidate, segment_bytes: u64) -> bool {
    bytes + next.bytes <= segment_bytes && next.end - base <= i64::from(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments() -> Vec<Candidate> {
        (0..5)
            .map(|k| Candidate {
                base: k * 100,
                end: k * 100 + 100,
                bytes: 1000,
                oldest_ms: Some(k * 1000),
                newest_ms: Some(k * 1000 + 900),
            })
            .collect()
    }

    const CONFIG: CompactionConfig = CompactionConfig {
        min_dirty_permille: 500,
        min_lag_ms: 0,
        max_lag_ms: i64::MAX,
        delete_retention_ms: 0,
    };

    #[test]
    fn by_share_age_and_limit() {
        let all = segments();
        assert_eq!(due(&all, 0, 1000, &CONFIG, 0), Some(500));
        assert_eq!(due(&[], 0, 1000, &CONFIG, 0), None);
        // Half of it is not more than half of it.
        assert_eq!(due(&all[..4], 200, 1000, &CONFIG, 0), None);
        assert_eq!(due(&all[..4], 100, 1000, &CONFIG, 0), Some(400));
        // A segment that was compacted in part counts as dirty.
        assert_eq!(due(&all[..4], 199, 1000, &CONFIG, 0), Some(400));
        assert_eq!(due(&all, 500, 1000, &CONFIG, 0), None);
        assert_eq!(due(&all, 0, 399, &CONFIG, 0), Some(300));
        assert_eq!(due(&all, 0, 99, &CONFIG, 0), None);
        let always = CompactionConfig { min_dirty_permille: 0, ..CONFIG };
        assert_eq!(due(&all, 400, 1000, &always, 0), Some(500));
        assert_eq!(due(&all, 500, 1000, &always, 0), None);
    }

    #[test]
    fn lags() {
        let all = segments();
        let late = CompactionConfig { min_lag_ms: 1000, ..CONFIG };
        assert_eq!(due(&all, 0, 1000, &late, 3900), Some(300));
        assert_eq!(due(&all, 0, 1000, &late, 1800), None);
        let unknown = vec![Candidate { newest_ms: None, ..all[0] }];
        assert_eq!(due(&unknown, 0, 1000, &late, 1 << 40), None);
        let never = CompactionConfig { min_dirty_permille: 1000, max_lag_ms: 2000, ..CONFIG };
        assert_eq!(due(&all, 300, 1000, &never, 5000), None);
        assert_eq!(due(&all, 300, 1000, &never, 5001), Some(500));
        assert_eq!(due(&all, 500, 1000, &never, 1 << 40), None);
    }

    #[test]
    fn small_segments_are_joined() {
        let next = segments()[3];
        assert!(joins((0, 500), &next, 1500));
        assert!(!joins((0, 501), &next, 1500));
        let far = Candidate { end: i64::from(i32::MAX) + 100, ..next };
        assert!(joins((100, 0), &far, 1500));
        assert!(!joins((99, 0), &far, 1500));
    }
}
