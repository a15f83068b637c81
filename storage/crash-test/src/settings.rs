//! What one seed is about: its disk, its faults, its store. Everything follows from the number.

use flumen_io::simulated::{Random, Rates, Settings};
use flumen_storage::StoreConfig;

/// What is broken besides crashing. One theme per seed, so that a failure has few suspects; the last has them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Theme {
    Crashes,
    FullDisk,
    FailedSyncs,
    FailedWrites,
    FailedReads,
    Stalls,
    Everything,
    /// Bits flip and writes go astray: acknowledged content may be unreadable, but then the store says so.
    Damage,
}

pub const THEMES: [Theme; 8] = [
    Theme::Crashes,
    Theme::FullDisk,
    Theme::FailedSyncs,
    Theme::FailedWrites,
    Theme::FailedReads,
    Theme::Stalls,
    Theme::Everything,
    Theme::Damage,
];

impl Theme {
    pub fn rates(self) -> Rates {
        let crashes =
            Rates { torn: 40_000, zero: 30_000, garbage: 30_000, evicted: 300_000, ..Rates::default() };
        match self {
            Theme::Crashes => crashes,
            Theme::FullDisk => Rates { no_space: 2_000, ..crashes },
            Theme::FailedSyncs => Rates { sync_fails: 15_000, ..crashes },
            Theme::FailedWrites => Rates { write_fails: 1_500, ..crashes },
            Theme::FailedReads => Rates { read_fails: 10_000, ..crashes },
            Theme::Stalls => Rates { sync_stalls: 100_000, ..crashes },
            Theme::Everything => Rates {
                no_space: 700,
                sync_fails: 4_000,
                write_fails: 500,
                read_fails: 3_000,
                sync_stalls: 20_000,
                ..crashes
            },
            Theme::Damage => Rates { bit_flips: 700, stray_writes: 1_500, ruins: 500_000, ..crashes },
        }
    }
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub theme: Theme,
    pub disk: Settings,
    pub store: StoreConfig,
    pub partitions: u64,
    pub clients: usize,
    pub crashes: u64,
    /// The partitions have members, and sometimes begin anew.
    pub replicated: bool,
    /// And begin with what another replica has below its entries.
    pub receives: bool,
}

/// Seeds below this mean what they meant before partitions had members; some of them are kept because they failed once.
pub const REPLICATED_FROM: u64 = 6_000;
/// And those below this, what they meant before logs began with received segments.
pub const RECEIVES_FROM: u64 = 40_000;

impl Plan {
    pub fn of(seed: u64, crashes: u64, log: bool) -> Plan {
        let mut random = Random::new(seed ^ 0x706c_616e);
        let theme = THEMES[usize::try_from(seed % THEMES.len() as u64).unwrap_or(0)];
        Plan {
            theme,
            disk: Settings {
                sector_bytes: if random.below(2) == 0 { 512 } else { 4096 },
                capacity_bytes: 64 << 20,
                rates: Rates::default(),
                log,
                ..Settings::default()
            },
            store: StoreConfig {
                // Small rings turn over many times between two crashes.
                wal_file_bytes: 256 << 10,
                wal_files_max: 3 + usize::try_from(random.below(2)).unwrap_or(0),
                cache_bytes: 32 << (10 + random.below(5)),
                direct_batch_bytes: [usize::MAX, 1, 500, 4_000]
                    [usize::try_from(random.below(4)).unwrap_or(0)],
                direct_run_bytes: [1, 4 << 10, 16 << 10][usize::try_from(random.below(3)).unwrap_or(0)],
                ..StoreConfig::default()
            },
            partitions: 2 + random.below(4),
            clients: 2 + usize::try_from(random.below(3)).unwrap_or(0),
            crashes,
            replicated: seed >= REPLICATED_FROM,
            receives: seed >= RECEIVES_FROM,
        }
    }
}

/// Whatever any theme allows.
pub fn all_rates() -> Rates {
    let mut all = Rates::default();
    for rates in THEMES.map(Theme::rates) {
        all = Rates {
            sync_fails: all.sync_fails.max(rates.sync_fails),
            sync_stalls: all.sync_stalls.max(rates.sync_stalls),
            write_fails: all.write_fails.max(rates.write_fails),
            read_fails: all.read_fails.max(rates.read_fails),
            no_space: all.no_space.max(rates.no_space),
            bit_flips: all.bit_flips.max(rates.bit_flips),
            stray_writes: all.stray_writes.max(rates.stray_writes),
            torn: all.torn.max(rates.torn),
            zero: all.zero.max(rates.zero),
            garbage: all.garbage.max(rates.garbage),
            ruins: all.ruins.max(rates.ruins),
            evicted: all.evicted.max(rates.evicted),
        };
    }
    all
}
