//! What can go wrong on a simulated disk, how often, and how often it did.

use std::fmt;

/// Every kind of fault has a counter, so that a run can tell what it has not tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Fault {
    /// The process died; the page cache stayed.
    Kill,
    /// The machine died; what was not synced is decided sector by sector.
    PowerLoss,
    /// A write was on its way when that happened.
    MidWrite,
    SectorOld,
    SectorNew,
    SectorTorn,
    SectorZero,
    SectorGarbage,
    /// A create, rename or removal without a sync of its directory.
    NameLost,
    NameKept,
    /// A file was cut or extended, and its former length came back.
    LengthLost,
    /// A sync returned an error and forgot the pages; the next one succeeds without them.
    SyncFails,
    SyncStalls,
    WriteFails,
    ReadFails,
    /// A bit changed while nobody looked.
    BitFlip,
    /// A write landed elsewhere and was reported done.
    StrayWrite,
    NoSpace,
    /// After a killed process: a clean page went from memory and was read from the disk again.
    Evicted,
}

impl Fault {
    pub const ALL: [Fault; 19] = [
        Fault::Kill,
        Fault::PowerLoss,
        Fault::MidWrite,
        Fault::SectorOld,
        Fault::SectorNew,
        Fault::SectorTorn,
        Fault::SectorZero,
        Fault::SectorGarbage,
        Fault::NameLost,
        Fault::NameKept,
        Fault::LengthLost,
        Fault::SyncFails,
        Fault::SyncStalls,
        Fault::WriteFails,
        Fault::ReadFails,
        Fault::BitFlip,
        Fault::StrayWrite,
        Fault::NoSpace,
        Fault::Evicted,
    ];
}

/// How often each fault happens, in millionths of the operations that could suffer it; 0 is never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    pub sync_fails: u32,
    pub sync_stalls: u32,
    pub write_fails: u32,
    pub read_fails: u32,
    /// Per operation: a window without space begins.
    pub no_space: u32,
    /// Per operation, of any file.
    pub bit_flips: u32,
    pub stray_writes: u32,
    /// Of unsynced sectors at a loss of power: torn, zero, garbage; the rest is old or new.
    pub torn: u32,
    pub zero: u32,
    pub garbage: u32,
    /// Of those sectors that hold durable bytes beside unsynced ones: may become zero or garbage like the others. Real
    /// disks do not do that short of breaking (what one write covers of a sector is new or old, the rest stays), and no
    /// file that is appended to could survive it; it is damage, for tests of how damage is met.
    pub ruins: u32,
    /// Of clean pages when a process was killed.
    pub evicted: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters([u64; Fault::ALL.len()]);

impl Counters {
    pub fn count(&mut self, fault: Fault) {
        self.0[fault as usize] += 1;
    }

    pub fn of(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }

    pub fn add(&mut self, other: &Counters) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    /// Kinds that the rates allow and that never came up.
    pub fn missing(&self, rates: &Rates) -> Vec<Fault> {
        let enabled = |fault| match fault {
            Fault::SectorTorn => rates.torn > 0,
            Fault::SectorZero => rates.zero > 0,
            Fault::SectorGarbage => rates.garbage > 0,
            Fault::SyncFails => rates.sync_fails > 0,
            Fault::SyncStalls => rates.sync_stalls > 0,
            Fault::WriteFails => rates.write_fails > 0,
            Fault::ReadFails => rates.read_fails > 0,
            Fault::BitFlip => rates.bit_flips > 0,
            Fault::StrayWrite => rates.stray_writes > 0,
            Fault::NoSpace => rates.no_space > 0,
            Fault::Evicted => rates.evicted > 0,
            _ => true,
        };
        Fault::ALL.into_iter().filter(|fault| enabled(*fault) && self.of(*fault) == 0).collect()
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, fault) in Fault::ALL.into_iter().enumerate() {
            write!(f, "{}{fault:?} {}", if at == 0 { "" } else { ", " }, self.of(fault))?;
        }
        Ok(())
    }
}
