//! Places where a process can be told to die, so that tests of real processes crash in the middle of a step and not only
//! at any moment (`tests/tests/kill_cycles.rs`).
//!
//! `FLUMEN_FAILPOINT=roll-created:3` ends the process when it comes to that place for the third time, by `abort`: nothing
//! unwinds, nothing is flushed, every thread stops where it is. Only in builds with debug assertions; in others `pass` is
//! empty, and the variable means nothing. A name that no place has ends the process at its first failpoint, so that no test
//! waits for a place that is not there.

/// The environment variable.
#[cfg(debug_assertions)]
const VARIABLE: &str = "FLUMEN_FAILPOINT";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failpoint {
    /// A new segment's file is there and empty; or has its first run, which is not counted.
    RollCreated,
    RollWritten,
    /// Segments are synced, group states not yet written; or those are durable and the WAL file is not yet free.
    RetireSynced,
    RetireCounted,
    /// The compacted segment is synced under its first name; has its last one, not synced; or that is sure, and what it
    /// replaces is still there.
    CompactWritten,
    CompactRenamed,
    CompactSwapped,
    /// Half of a producer snapshot is written; or all of it, and the old ones are still there.
    ProducersTorn,
    ProducersWritten,
    /// A metadata snapshot is synced under its first name; or has its last one, and the log is not cut.
    MetadataWritten,
    MetadataRenamed,
    /// The metadata log is a new one and has entries, and the metadata did not come. Who is to die there waits for them.
    MetadataJoined,
    /// Recovery: segments are synced; group states replaced; the WAL id too, and what it makes worthless is still there.
    RecoverySynced,
    RecoveryStates,
    RecoveryCurrent,
    /// A deleted partition's directory has its new name; or the record of that is durable, and the files are there.
    DeletionRenamed,
    DeletionRecorded,
    /// Runs that go past the WAL are in their segments, and not synced; or they are, and nothing counts them yet.
    DirectWritten,
    DirectSynced,
    /// What lies below the entries of another replica is here and synced, and does not count; or the log begins with it, and
    /// it has its names.
    ReceivedSynced,
    ReceivedPlaced,
}

#[cfg(debug_assertions)]
impl Failpoint {
    const ALL: [Self; 21] = [
        Self::RollCreated,
        Self::RollWritten,
        Self::RetireSynced,
        Self::RetireCounted,
        Self::CompactWritten,
        Self::CompactRenamed,
        Self::CompactSwapped,
        Self::ProducersTorn,
        Self::ProducersWritten,
        Self::MetadataWritten,
        Self::MetadataRenamed,
        Self::MetadataJoined,
        Self::RecoverySynced,
        Self::RecoveryStates,
        Self::RecoveryCurrent,
        Self::DeletionRenamed,
        Self::DeletionRecorded,
        Self::DirectWritten,
        Self::DirectSynced,
        Self::ReceivedSynced,
        Self::ReceivedPlaced,
    ];

    /// `RollCreated` is `roll-created`.
    fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_ascii_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(letter.to_ascii_lowercase());
        }
        name
    }

    /// What the variable says: the place, and at which passage.
    fn parse(text: &str) -> Option<(Self, u32)> {
        let (name, number) = text.split_once(':').unwrap_or((text, "1"));
        let point = Self::ALL.into_iter().find(|point| point.name() == name)?;
        number.parse().ok().filter(|number| *number > 0).map(|number| (point, number))
    }
}

#[cfg(debug_assertions)]
fn asked() -> Option<(Failpoint, u32)> {
    use std::sync::OnceLock;

    static ASKED: OnceLock<Option<(Failpoint, u32)>> = OnceLock::new();
    *ASKED.get_or_init(|| {
        let text = std::env::var(VARIABLE).ok()?;
        let parsed = Failpoint::parse(&text);
        if parsed.is_none() {
            eprintln!("{VARIABLE}={text}: there is no such place");
            std::process::exit(2);
        }
        parsed
    })
}

/// Whether the process is to die at this place, sooner or later.
#[cfg(debug_assertions)]
pub fn is_asked(point: Failpoint) -> bool {
    asked().is_some_and(|(asked, _)| asked == point)
}

#[cfg(not(debug_assertions))]
pub const fn is_asked(_: Failpoint) -> bool {
    false
}

/// Whether this is the place and the passage that the process was told.
#[cfg(debug_assertions)]
fn count(point: Failpoint) -> bool {
    use std::sync::atomic::{AtomicU32, Ordering};

    static PASSED: AtomicU32 = AtomicU32::new(0);
    asked()
        .is_some_and(|(asked, number)| asked == point && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == number)
}

#[cfg(debug_assertions)]
fn die(point: Failpoint) -> ! {
    eprintln!("failpoint {}", point.name());
    std::process::abort()
}

#[cfg(debug_assertions)]
pub fn pass(point: Failpoint) {
    if count(point) {
        die(point);
    }
}

#[cfg(not(debug_assertions))]
pub const fn pass(_: Failpoint) {}

/// As `pass`, for a place in the middle of a write: `half` does the first part of it, if the process is to die there.
#[cfg(debug_assertions)]
pub(crate) fn pass_torn<T>(point: Failpoint, half: impl FnOnce() -> T) {
    if count(point) {
        drop(half());
        die(point);
    }
}

#[cfg(not(debug_assertions))]
pub(crate) fn pass_torn<T>(_: Failpoint, _: impl FnOnce() -> T) {}

/// `FLUMEN_SMALL=1` in a build with debug assertions: rings, caches and intervals so small that a test of some megabytes
/// turns everything over many times.
#[cfg(debug_assertions)]
pub fn small() -> bool {
    std::env::var_os("FLUMEN_SMALL").is_some()
}

#[cfg(not(debug_assertions))]
pub const fn small() -> bool {
    false
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    #[test]
    fn places_have_names() {
        assert_eq!(Failpoint::parse("roll-created:3"), Some((Failpoint::RollCreated, 3)));
        assert_eq!(Failpoint::parse("deletion-recorded"), Some((Failpoint::DeletionRecorded, 1)));
        for text in ["", "roll", "roll-created:0", "roll-created:", "roll-created:x"] {
            assert_eq!(Failpoint::parse(text), None, "{text}");
        }
    }
}
