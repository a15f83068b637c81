//! What a broker takes from the process that it runs in, so that a simulation can give it something else: the wall clock,
//! chance, and what becomes of it when its log has failed.
//!
//! Shards ask it. Timers come from tokio, whose clock a simulation can stop; files from `flumen_io`.

use std::fmt;
use std::io::Write;

/// Exit status when the log failed: an operator has to look at the disk (sysexits EX_IOERR).
const EXIT_LOG_FAILED: i32 = 74;

pub trait Host: fmt::Debug + Send + Sync {
    /// Wall clock, for record timestamps, retention and expiry.
    fn now_ms(&self) -> i64;
    /// Random enough that two calls, anywhere, never have the same.
    fn draw(&self) -> u64;
    /// Ends the broker. Where this returns (in a simulation), nothing that the broker still does may reach anybody.
    fn log_failed(&self, shard: usize, reason: &str);
}

/// A process of its own.
#[derive(Debug)]
pub struct Process;

impl Host for Process {
    fn now_ms(&self) -> i64 {
        crate::node::now_ms()
    }

    fn draw(&self) -> u64 {
        let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
        high ^ low.rotate_left(32)
    }

    fn log_failed(&self, shard: usize, reason: &str) {
        // Standard error may lie on the disk that failed: whatever becomes of the sentence, this process ends.
        let _ = writeln!(
            std::io::stderr(),
            "flumen: the log of shard {shard} failed: {reason}; stopping without acknowledging what was in flight"
        );
        std::process::exit(EXIT_LOG_FAILED)
    }
}
