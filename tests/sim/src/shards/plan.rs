//! What one seed is about: how many brokers, which partitions, what goes wrong. Everything follows from the number.

use std::fmt;

use flumen_io::simulated::Rates;
use flumen_metadata::{CleanupPolicy, Durability, TopicConfig};
use flumen_storage::StoreConfig;

use crate::rng::Rng;

/// One theme per seed, so that a failure has few suspects; the last has them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Theme {
    /// The network and the scheduler only: no broker ends, so that topics that acknowledge from memory must keep everything.
    Network,
    /// Processes end; the kernel keeps what it was given.
    Kills,
    PowerLoss,
    /// Disks fail, stall and are full.
    Disk,
    /// Replicas move, while processes end.
    Moves,
    Everything,
}

const THEMES: [Theme; 6] =
    [Theme::Network, Theme::Kills, Theme::PowerLoss, Theme::Disk, Theme::Moves, Theme::Everything];

/// Of the seeds whose theme allows it.
const LOSSES_EVERY: u64 = 3;

impl Theme {
    pub fn kills(self) -> bool {
        self != Theme::Network
    }

    pub fn loses_power(self) -> bool {
        matches!(self, Theme::PowerLoss | Theme::Disk | Theme::Everything)
    }

    pub fn moves(self) -> bool {
        matches!(self, Theme::Network | Theme::Moves | Theme::Everything)
    }

    /// While brokers run. What a crash leaves of unsynced sectors is decided by the same rates.
    pub fn rates(self) -> Rates {
        let quiet = quiet();
        match self {
            Theme::Disk => Rates {
                sync_fails: 300,
                write_fails: 100,
                read_fails: 1_500,
                no_space: 150,
                sync_stalls: 4_000,
                ..quiet
            },
            Theme::Everything => Rates {
                sync_fails: 60,
                write_fails: 30,
                read_fails: 500,
                no_space: 60,
                sync_stalls: 1_000,
                ..quiet
            },
            _ => quiet,
        }
    }
}

/// Nothing fails while a machine runs.
pub(crate) fn quiet() -> Rates {
    Rates { torn: 40_000, zero: 30_000, garbage: 30_000, evicted: 300_000, ..Rates::default() }
}

pub(crate) struct Plan {
    pub theme: Theme,
    pub brokers: usize,
    pub sector_bytes: usize,
    pub store: StoreConfig,
    /// Those of the offsets topic come last.
    pub partitions: Vec<PartitionPlan>,
    pub groups: Vec<GroupPlan>,
    pub faults_ms: u64,
    /// Brokers lose logs while they are down.
    pub loses_logs: bool,
}

/// A consumer group.
#[derive(Clone)]
pub(crate) struct GroupPlan {
    pub members: u64,
    pub session_timeout_ms: i32,
    pub rebalance_timeout_ms: i32,
    /// Of the brokers: how long an empty group waits for more members.
    pub initial_delay_ms: i64,
}

pub(crate) struct PartitionPlan {
    /// Of the offsets topic; else of the one that clients write to.
    pub keeps_groups: bool,
    pub replicas: Vec<i32>,
    pub config: TopicConfig,
}

impl Plan {
    pub fn of(seed: u64, rng: &mut Rng) -> Plan {
        let theme = THEMES[(seed % THEMES.len() as u64) as usize];
        // A broker that is alone has no network, so that theme is for several.
        let brokers = match theme {
            Theme::Network | Theme::Moves => rng.pick(&[3, 3, 4, 5]),
            _ => rng.pick(&[1, 1, 3, 3, 3, 3, 4, 5]),
        };
        let mut partitions: Vec<PartitionPlan> =
            (0..rng.between(1, 3)).map(|_| PartitionPlan::of(brokers, rng)).collect();
        partitions.extend((0..rng.between(1, 2)).map(|_| PartitionPlan::of_groups(brokers, rng)));
        let initial_delay_ms = rng.pick(&[0, 100, 500]);
        let groups = (0..rng.between(1, 2)).map(|_| GroupPlan::of(initial_delay_ms, rng)).collect();
        Plan {
            theme,
            brokers,
            sector_bytes: rng.pick(&[512, 4096]),
            store: StoreConfig {
                // Small rings and caches, so that what is not committed, not flushed or not cached matters.
                wal_file_bytes: rng.pick(&[1 << 20, 2 << 20]),
                cache_bytes: rng.pick(&[8 << 10, 64 << 10, 1 << 20]),
                direct_batch_bytes: rng.pick(&[usize::MAX, 1, 1_000]),
                direct_run_bytes: rng.pick(&[1, 4 << 10]),
                ..StoreConfig::default()
            },
            partitions,
            groups,
            faults_ms: rng.between(4_000, 12_000),
            // Not drawn, so that other seeds stay what they are. Where power or disks fail as well, more than one replica of a
            // partition could be lost.
            loses_logs: matches!(theme, Theme::Kills | Theme::Moves)
                && (seed / THEMES.len() as u64).is_multiple_of(LOSSES_EVERY),
        }
    }
}

impl Plan {
    /// Indexes of the partitions that clients write to.
    pub fn data_partitions(&self) -> Vec<i32> {
        (0..).zip(&self.partitions).filter(|(_, plan)| !plan.keeps_groups).map(|(index, _)| index).collect()
    }

    pub fn keeps_groups(&self, group: u64) -> bool {
        self.partitions[group as usize - 1].keeps_groups
    }
}

impl GroupPlan {
    fn of(initial_delay_ms: i64, rng: &mut Rng) -> GroupPlan {
        GroupPlan {
            members: rng.between(1, 3),
            session_timeout_ms: rng.pick(&[600, 1_500]),
            rebalance_timeout_ms: rng.pick(&[800, 2_000]),
            initial_delay_ms,
        }
    }
}

/// For whoever looks at a failure.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let losses = if self.loses_logs { " and lost logs" } else { "" };
        write!(f, "{:?}{losses}, {} brokers", self.theme, self.brokers)?;
        for (group, partition) in (1..).zip(&self.partitions) {
            let what = if partition.keeps_groups { "groups" } else { "t" };
            write!(f, ", {what}-{group} {:?} on {:?}", partition.config.durability, partition.replicas)?;
        }
        Ok(())
    }
}

impl PartitionPlan {
    /// As the broker makes them.
    fn of_groups(brokers: usize, rng: &mut Rng) -> PartitionPlan {
        let PartitionPlan { replicas, config, .. } = PartitionPlan::of(brokers, rng);
        let config = TopicConfig {
            cleanup_policy: CleanupPolicy { delete: false, compact: false },
            durability: Durability::Durable,
            retention_bytes: -1,
            ..config
        };
        PartitionPlan { keeps_groups: true, replicas, config }
    }

    fn of(brokers: usize, rng: &mut Rng) -> PartitionPlan {
        let mut ids: Vec<i32> = (0..brokers as i32).collect();
        for at in (1..ids.len()).rev() {
            ids.swap(at, rng.below(at as u64 + 1) as usize);
        }
        ids.truncate(if rng.below(8) == 0 { 1 } else { 3 });
        let config = TopicConfig {
            durability: rng.pick(&[
                Durability::Durable,
                Durability::Durable,
                Durability::Durable,
                Durability::Os,
                Durability::Memory,
            ]),
            segment_bytes: rng.pick(&[4 << 10, 16 << 10, 1 << 20]),
            retention_ms: -1,
            retention_bytes: rng.pick(&[-1, -1, 8 << 10, 64 << 10]),
            ..TopicConfig::default()
        };
        PartitionPlan { keeps_groups: false, replicas: ids, config }
    }
}
