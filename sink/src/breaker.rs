//! When to try ClickHouse again: exponential back-off and a circuit breaker.
//!
//! Pure: time comes in as milliseconds of any monotonic clock. No jitter, so that runs repeat; there is one exporter
//! per topic and their failures are not in step. It does not know what failed; `settle::classify` does.

use serde::Serialize;

/// First wait after a failure.
pub const BACKOFF_FIRST_MS: u64 = 250;
/// Longest wait: an outage of a day costs one query in 10 s per export, and its end is noticed soon.
pub const BACKOFF_MAX_MS: u64 = 10_000;
/// Failures in a row until inserts stop and only `SELECT 1` is tried.
pub const OPEN_AFTER: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Inserts go through.
    Closed,
    /// Nothing is sent until the wait is over.
    Open,
    /// The next step is a probe; then one plan.
    HalfOpen,
}

impl BreakerState {
    pub const ALL: [BreakerState; 3] = [BreakerState::Closed, BreakerState::Open, BreakerState::HalfOpen];

    pub fn as_str(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::Open => "open",
            BreakerState::HalfOpen => "half_open",
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Breaker {
    failures: u32,
    retry_at_ms: Option<u64>,
}

impl Breaker {
    pub fn new() -> Breaker {
        Breaker::default()
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }

    pub fn state(&self, now_ms: u64) -> BreakerState {
        match self.retry_at_ms {
            _ if self.failures < OPEN_AFTER => BreakerState::Closed,
            Some(at) if now_ms < at => BreakerState::Open,
            _ => BreakerState::HalfOpen,
        }
    }

    /// Whether `SELECT 1` must succeed before an insert is tried.
    pub fn needs_probe(&self) -> bool {
        self.failures >= OPEN_AFTER
    }

    /// Milliseconds until the next attempt.
    pub fn wait_ms(&self, now_ms: u64) -> u64 {
        self.retry_at_ms.map_or(0, |at| at.saturating_sub(now_ms))
    }

    pub fn failed(&mut self, now_ms: u64) {
        let wait = backoff_ms(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.retry_at_ms = Some(now_ms.saturating_add(wait));
    }

    pub fn succeeded(&mut self) {
        *self = Breaker::default();
    }
}

/// The wait after `failures` failures before this one.
pub fn backoff_ms(failures: u32) -> u64 {
    BACKOFF_FIRST_MS.saturating_mul(1u64 << failures.min(16)).min(BACKOFF_MAX_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_are_bounded() {
        let waits: Vec<u64> = (0..10).map(backoff_ms).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000, 10_000, 10_000]);
        assert_eq!(backoff_ms(u32::MAX), BACKOFF_MAX_MS);
    }

    #[test]
    fn opens_after_five_and_closes_on_success() {
        let mut breaker = Breaker::new();
        let mut now = 1000;
        for _ in 0..4 {
            breaker.failed(now);
            assert_eq!(breaker.state(now), BreakerState::Closed);
            now += breaker.wait_ms(now);
        }
        breaker.failed(now);
        assert_eq!(breaker.state(now), BreakerState::Open);
        assert_eq!(breaker.wait_ms(now), 4000);
        assert_eq!(breaker.state(now + 4000), BreakerState::HalfOpen);
        assert!(breaker.needs_probe());
        breaker.succeeded();
        assert_eq!(breaker.state(now), BreakerState::Closed);
        assert_eq!(breaker.wait_ms(now), 0);
    }
}
