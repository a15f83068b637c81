//! The table of group configurations: names, types, defaults, limits.
//!
//! They belong to the consumer, share and streams groups of KIP-848, KIP-932 and KIP-1071, none of which is served yet:
//! the values are checked, stored and reported, so that tools that set them work and find them again.

use crate::config_def::{Check, ConfigDef, ConfigKind, at_least};

#[derive(Debug, Clone, Copy)]
pub struct GroupConfigDef {
    pub def: ConfigDef,
    /// The broker config that Kafka takes the default from, named among the synonyms.
    pub broker_synonym: &'static str,
}

const fn row(
    name: &'static str,
    kind: ConfigKind,
    default: &'static str,
    check: Check,
    broker_synonym: &'static str,
    doc: &'static str,
) -> GroupConfigDef {
    GroupConfigDef {
        def: ConfigDef { name, kind, default: Some(default), check, doc, honoured: false },
        broker_synonym,
    }
}

use ConfigKind::{Boolean, Int};

/// Sorted by name. The limits are those of the broker configs `group.*.min.*` and `group.*.max.*` of Kafka.
pub const GROUP_CONFIGS: &[GroupConfigDef] = &[
    row(
        "consumer.assignment.interval.ms",
        Int,
        "1000",
        Check::Between(0, 15_000),
        "group.consumer.assignment.interval.ms",
        "Shortest time (ms) between two assignments of a consumer group.",
    ),
    row(
        "consumer.heartbeat.interval.ms",
        Int,
        "5000",
        Check::Between(5_000, 15_000),
        "group.consumer.heartbeat.interval.ms",
        "How often (ms) members of a consumer group report.",
    ),
    row(
        "consumer.session.timeout.ms",
        Int,
        "45000",
        Check::Between(45_000, 60_000),
        "group.consumer.session.timeout.ms",
        "Silence (ms) after which a member leaves a consumer group.",
    ),
    row(
        "share.assignment.interval.ms",
        Int,
        "1000",
        Check::Between(0, 15_000),
        "group.share.assignment.interval.ms",
        "Shortest time (ms) between two assignments of a share group.",
    ),
    row(
        "share.auto.offset.reset",
        ConfigKind::String,
        "latest",
        Check::With(check_reset),
        "share.auto.offset.reset",
        "Where a share group starts to read: latest, earliest or by_duration:<ISO 8601 duration>.",
    ),
    row(
        "share.delivery.count.limit",
        Int,
        "5",
        Check::Between(2, 10),
        "group.share.delivery.count.limit",
        "How often a record is delivered to a share group at most.",
    ),
    row(
        "share.heartbeat.interval.ms",
        Int,
        "5000",
        Check::Between(5_000, 15_000),
        "group.share.heartbeat.interval.ms",
        "How often (ms) members of a share group report.",
    ),
    row(
        "share.isolation.level",
        ConfigKind::String,
        "read_uncommitted",
        Check::OneOf(&["read_committed", "read_uncommitted"]),
        "share.isolation.level",
        "Whether a share group sees records of transactions that were aborted or are open.",
    ),
    row(
        "share.partition.max.record.locks",
        Int,
        "2000",
        Check::Between(100, 10_000),
        "group.share.partition.max.record.locks",
        "Records of a partition that a share group may hold at a time.",
    ),
    row(
        "share.record.lock.duration.ms",
        Int,
        "30000",
        Check::Between(15_000, 60_000),
        "group.share.record.lock.duration.ms",
        "How long (ms) a member of a share group may hold a record.",
    ),
    row(
        "share.renew.acknowledge.enable",
        Boolean,
        "true",
        Check::Any,
        "share.renew.acknowledge.enable",
        "Whether members of a share group may prolong their hold on a record.",
    ),
    row(
        "share.session.timeout.ms",
        Int,
        "45000",
        Check::Between(45_000, 60_000),
        "group.share.session.timeout.ms",
        "Silence (ms) after which a member leaves a share group.",
    ),
    row(
        "streams.assignment.interval.ms",
        Int,
        "1000",
        Check::Between(0, 15_000),
        "group.streams.assignment.interval.ms",
        "Shortest time (ms) between two assignments of a streams group.",
    ),
    row(
        "streams.heartbeat.interval.ms",
        Int,
        "5000",
        Check::Between(5_000, 15_000),
        "group.streams.heartbeat.interval.ms",
        "How often (ms) members of a streams group report.",
    ),
    row(
        "streams.initial.rebalance.delay.ms",
        Int,
        "3000",
        at_least(0),
        "group.streams.initial.rebalance.delay.ms",
        "Time (ms) a new streams group waits for more members before its first assignment.",
    ),
    row(
        "streams.num.standby.replicas",
        Int,
        "0",
        Check::Between(0, 2),
        "group.streams.num.standby.replicas",
        "Standby copies of each task of a streams group.",
    ),
    row(
        "streams.session.timeout.ms",
        Int,
        "45000",
        Check::Between(45_000, 60_000),
        "group.streams.session.timeout.ms",
        "Silence (ms) after which a member leaves a streams group.",
    ),
];

pub fn group_def(name: &str) -> Option<&'static GroupConfigDef> {
    GROUP_CONFIGS.binary_search_by_key(&name, |row| row.def.name).ok().and_then(|at| GROUP_CONFIGS.get(at))
}

fn check_reset(value: &str) -> Result<(), String> {
    let duration = value.strip_prefix("by_duration:").is_some_and(|d| d.starts_with('P') && d.len() > 1);
    if duration || matches!(value, "latest" | "earliest") {
        return Ok(());
    }
    Err("must be latest, earliest or by_duration:<ISO 8601 duration>".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_its_defaults_are_valid() {
        assert!(GROUP_CONFIGS.is_sorted_by(|a, b| a.def.name < b.def.name));
        for row in GROUP_CONFIGS {
            let default = row.def.default.unwrap();
            assert_eq!(row.def.normalise(default).as_deref(), Ok(default), "{}", row.def.name);
        }
    }
}
