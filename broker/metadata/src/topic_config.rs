//! The topic configurations: Kafka's, with its names, types, defaults and limits, and `flumen.*`.
//!
//! `TopicConfig` is the typed form of what has an effect; everything else is stored and reported. Keys that belong
//! to other parts of the broker come in as [`ExtraConfig`]s.

use std::collections::BTreeMap;

use crate::broker_config::BrokerConfig;
use crate::config_def::{Check, ConfigDef, ConfigKind, ConfigSource, Layers, at_least, list, suggestion};

/// A broker-level name that gives a topic config its default, and what one of its units is in the topic's.
pub type Synonym = (&'static str, i64);

#[derive(Debug, Clone, Copy)]
pub struct TopicConfigDef {
    pub def: ConfigDef,
    /// The first one that is set counts.
    pub synonyms: &'static [Synonym],
}

const fn row(
    name: &'static str,
    kind: ConfigKind,
    default: &'static str,
    check: Check,
    honoured: bool,
    synonyms: &'static [Synonym],
    doc: &'static str,
) -> TopicConfigDef {
    TopicConfigDef { def: ConfigDef { name, kind, default: Some(default), check, doc, honoured }, synonyms }
}

const H: bool = true;
const R: bool = false;
const LONG_MAX: &str = "9223372036854775807";

pub(crate) const COMPRESSION_TYPES: &[&str] = &["uncompressed", "zstd", "lz4", "snappy", "gzip", "producer"];
pub(crate) const TIMESTAMP_TYPES: &[&str] = &["CreateTime", "LogAppendTime"];
pub(crate) const CLEANUP_POLICIES: &[&str] = &["compact", "delete"];
pub(crate) const DURABILITIES: &[&str] = &["durable", "os"];
const MIB: i64 = 1 << 20;

/// Sorted by name.
pub const TOPIC_CONFIGS: &[TopicConfigDef] = &[
    row(
        "cleanup.policy",
        ConfigKind::List,
        "delete",
        Check::SomeOf(CLEANUP_POLICIES),
        H,
        &[("log.cleanup.policy", 1)],
        "What happens to old records: 'delete' drops them by age and size, 'compact' keeps the last one of every key; both may be combined.",
    ),
    row(
        "compression.gzip.level",
        ConfigKind::Int,
        "-1",
        Check::With(check_gzip_level),
        R,
        &[("compression.gzip.level", 1)],
        "Level of gzip when the broker compresses.",
    ),
    row(
        "compression.lz4.level",
        ConfigKind::Int,
        "9",
        Check::Between(1, 17),
        R,
        &[("compression.lz4.level", 1)],
        "Level of lz4 when the broker compresses.",
    ),
    row(
        "compression.type",
        ConfigKind::String,
        "producer",
        Check::OneOf(COMPRESSION_TYPES),
        R,
        &[("compression.type", 1)],
        "Codec in which records are stored; 'producer' keeps what the producer sent, which is what this broker always does.",
    ),
    row(
        "compression.zstd.level",
        ConfigKind::Int,
        "3",
        Check::Between(-131_072, 22),
        R,
        &[("compression.zstd.level", 1)],
        "Level of zstd when the broker compresses.",
    ),
    row(
        "delete.retention.ms",
        ConfigKind::Long,
        "86400000",
        at_least(0),
        H,
        &[("log.cleaner.delete.retention.ms", 1)],
        "How long (ms) a compacted topic keeps the tombstone of a deleted key.",
    ),
    row(
        "file.delete.delay.ms",
        ConfigKind::Long,
        "60000",
        at_least(0),
        R,
        &[("log.segment.delete.delay.ms", 1)],
        "Time (ms) between dropping a file and removing it.",
    ),
    row(
        "flumen.durability",
        ConfigKind::String,
        "durable",
        Check::OneOf(DURABILITIES),
        H,
        &[("flumen.durability", 1)],
        "When records are acknowledged: 'durable' once the disk has them (survives power loss), 'os' once the kernel has them (survives a killed process, as Kafka's default).",
    ),
    row(
        "flush.messages",
        ConfigKind::Long,
        LONG_MAX,
        at_least(1),
        R,
        &[("log.flush.interval.messages", 1)],
        "Records after which the log is forced to disk; under flumen.durability=durable every acknowledged record already is.",
    ),
    row(
        "flush.ms",
        ConfigKind::Long,
        LONG_MAX,
        at_least(0),
        H,
        &[("log.flush.interval.ms", 1)],
        "Time (ms) after which the log is forced to disk under flumen.durability=os.",
    ),
    row(
        "follower.replication.throttled.replicas",
        ConfigKind::List,
        "",
        Check::Any,
        R,
        &[],
        "Replicas whose incoming replication is throttled, as partition:broker or '*'.",
    ),
    row(
        "index.interval.bytes",
        ConfigKind::Int,
        "4096",
        at_least(0),
        R,
        &[("log.index.interval.bytes", 1)],
        "Distance (bytes) between entries of the offset index.",
    ),
    row(
        "leader.replication.throttled.replicas",
        ConfigKind::List,
        "",
        Check::Any,
        R,
        &[],
        "Replicas whose outgoing replication is throttled, as partition:broker or '*'.",
    ),
    row(
        "local.retention.bytes",
        ConfigKind::Long,
        "-2",
        at_least(-2),
        R,
        &[("log.local.retention.bytes", 1)],
        "Bytes kept locally of a tiered partition; -2 means retention.bytes.",
    ),
    row(
        "local.retention.ms",
        ConfigKind::Long,
        "-2",
        at_least(-2),
        R,
        &[("log.local.retention.ms", 1)],
        "Time (ms) a tiered partition is kept locally; -2 means retention.ms.",
    ),
    row(
        "max.compaction.lag.ms",
        ConfigKind::Long,
        LONG_MAX,
        at_least(1),
        H,
        &[("log.cleaner.max.compaction.lag.ms", 1)],
        "Longest time (ms) a record may wait to be compacted.",
    ),
    row(
        "max.message.bytes",
        ConfigKind::Int,
        "1048588",
        at_least(0),
        H,
        &[("message.max.bytes", 1)],
        "Largest record batch (bytes, as sent) that is accepted.",
    ),
    row(
        "message.timestamp.after.max.ms",
        ConfigKind::Long,
        "3600000",
        at_least(0),
        H,
        &[("log.message.timestamp.after.max.ms", 1)],
        "How far (ms) a record's timestamp may lie in the broker's future; later ones are refused.",
    ),
    row(
        "message.timestamp.before.max.ms",
        ConfigKind::Long,
        LONG_MAX,
        at_least(0),
        H,
        &[("log.message.timestamp.before.max.ms", 1)],
        "How far (ms) a record's timestamp may lie in the broker's past; earlier ones are refused.",
    ),
    row(
        "message.timestamp.type",
        ConfigKind::String,
        "CreateTime",
        Check::OneOf(TIMESTAMP_TYPES),
        H,
        &[("log.message.timestamp.type", 1)],
        "Whose clock stamps records: the producer's (CreateTime) or the broker's (LogAppendTime).",
    ),
    row(
        "min.cleanable.dirty.ratio",
        ConfigKind::Double,
        "0.5",
        Check::Ratio,
        H,
        &[("log.cleaner.min.cleanable.ratio", 1)],
        "Share of a compacted log that must be new before it is compacted again.",
    ),
    row(
        "min.compaction.lag.ms",
        ConfigKind::Long,
        "0",
        at_least(0),
        H,
        &[("log.cleaner.min.compaction.lag.ms", 1)],
        "Shortest time (ms) a record stays before it may be compacted.",
    ),
    row(
        "min.insync.replicas",
        ConfigKind::Int,
        "1",
        at_least(1),
        R,
        &[("min.insync.replicas", 1)],
        "Replicas that must have a record before acks=all is answered; the majority of the partition's Raft group decides here.",
    ),
    row(
        "preallocate",
        ConfigKind::Boolean,
        "false",
        Check::Any,
        R,
        &[("log.preallocate", 1)],
        "Whether a segment file gets its full size when it is made.",
    ),
    row(
        "remote.copy.lag.bytes",
        ConfigKind::Long,
        "0",
        at_least(-1),
        R,
        &[],
        "Bytes that stay behind the tail before a segment is tiered.",
    ),
    row(
        "remote.copy.lag.ms",
        ConfigKind::Long,
        "0",
        at_least(-1),
        R,
        &[],
        "Time (ms) before a segment is tiered.",
    ),
    row(
        "remote.log.copy.disable",
        ConfigKind::Boolean,
        "false",
        Check::Any,
        R,
        &[],
        "Whether tiering stops while what was tiered stays readable.",
    ),
    row(
        "remote.log.delete.on.disable",
        ConfigKind::Boolean,
        "false",
        Check::Any,
        R,
        &[],
        "Whether turning tiering off deletes what was tiered.",
    ),
    row(
        "remote.storage.enable",
        ConfigKind::Boolean,
        "false",
        Check::With(check_remote_storage),
        R,
        &[],
        "Whether old segments move to remote storage.",
    ),
    row(
        "retention.bytes",
        ConfigKind::Long,
        "-1",
        at_least(-1),
        H,
        &[("log.retention.bytes", 1)],
        "Size (bytes) beyond which a partition drops its oldest segments; -1 means no limit.",
    ),
    row(
        "retention.ms",
        ConfigKind::Long,
        "604800000",
        at_least(-1),
        H,
        &[("log.retention.ms", 1), ("log.retention.minutes", 60_000), ("log.retention.hours", 3_600_000)],
        "Age (ms) at which records are dropped; -1 means no limit.",
    ),
    row(
        "segment.bytes",
        ConfigKind::Int,
        "1073741824",
        at_least(MIB),
        H,
        &[("log.segment.bytes", 1)],
        "Size (bytes) at which a segment file is full; retention and compaction work on whole segments.",
    ),
    row(
        "segment.index.bytes",
        ConfigKind::Int,
        "10485760",
        at_least(4),
        R,
        &[("log.index.size.max.bytes", 1)],
        "Largest size (bytes) of a segment's index.",
    ),
    row(
        "segment.jitter.ms",
        ConfigKind::Long,
        "0",
        at_least(0),
        R,
        &[("log.roll.jitter.ms", 1), ("log.roll.jitter.hours", 3_600_000)],
        "Random time (ms) taken off segment.ms, so that partitions do not roll together.",
    ),
    row(
        "segment.ms",
        ConfigKind::Long,
        "604800000",
        at_least(1),
        H,
        &[("log.roll.ms", 1), ("log.roll.hours", 3_600_000)],
        "Age (ms) at which a segment is closed even when it is not full.",
    ),
    row(
        "unclean.leader.election.enable",
        ConfigKind::Boolean,
        "false",
        Check::Any,
        R,
        &[("unclean.leader.election.enable", 1)],
        "Whether a replica that lags may lead; Raft never lets it.",
    ),
];

/// Names that old tools still send and that Kafka 4 no longer has. Accepted and dropped.
pub const REMOVED_CONFIGS: &[&str] = &[
    "compaction.strategy",
    "message.downconversion.enable",
    "message.format.version",
    "message.timestamp.difference.max.ms",
];

fn check_gzip_level(value: &str) -> Result<(), String> {
    match value.parse() {
        Ok(-1 | 1..=9) => Ok(()),
        _ => Err("must be -1 or between 1 and 9".into()),
    }
}

/// Accepting `true` would promise that the data is kept elsewhere.
fn check_remote_storage(value: &str) -> Result<(), String> {
    if value == "true" {
        return Err(
            "tiered storage is not available on this broker, so it cannot be enabled for a topic".into()
        );
    }
    Ok(())
}

pub fn is_removed(name: &str) -> bool {
    REMOVED_CONFIGS.contains(&name)
}

pub fn topic_def(name: &str) -> Option<&'static TopicConfigDef> {
    TOPIC_CONFIGS.binary_search_by_key(&name, |row| row.def.name).ok().and_then(|at| TOPIC_CONFIGS.get(at))
}

/// The definition of a topic config, of this table or of the extra ones the broker was given.
pub fn find_def(name: &str, config: &BrokerConfig) -> Option<ConfigDef> {
    topic_def(name)
        .map(|row| row.def)
        .or_else(|| config.topic_extras.iter().find(|extra| extra.name == name).map(|extra| extra.def()))
}

/// Checks one setting and brings it to its stored form; `None` for a name that is accepted and dropped.
pub fn check_setting(name: &str, value: &str, config: &BrokerConfig) -> Result<Option<String>, String> {
    if is_removed(name) {
        return Ok(None);
    }
    let Some(def) = find_def(name, config) else {
        let known =
            TOPIC_CONFIGS.iter().map(|row| row.def.name).chain(config.topic_extras.iter().map(|e| e.name));
        return Err(format!("Unknown topic config name: {name}{}", suggestion(name, known)));
    };
    def.normalise(value)
        .map(Some)
        .map_err(|reason| format!("Invalid value {value} for configuration {name}: {reason}"))
}

/// Checks what settings must satisfy together. `overrides` are in stored form.
pub fn check_together(
    overrides: &BTreeMap<String, String>,
    layers: &Layers<'_>,
    config: &BrokerConfig,
) -> Result<(), String> {
    let typed = TopicConfig::resolve(overrides, layers);
    if typed.min_compaction_lag_ms > typed.max_compaction_lag_ms {
        return Err(format!(
            "conflicting settings: min.compaction.lag.ms ({}) is larger than max.compaction.lag.ms ({})",
            typed.min_compaction_lag_ms, typed.max_compaction_lag_ms
        ));
    }
    config.topic_check.map_or(Ok(()), |check| check(overrides))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestampType {
    CreateTime,
    LogAppendTime,
}

/// What an acknowledgement means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The disk has the records.
    Durable,
    /// The kernel has the records.
    Os,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionType {
    Producer,
    Uncompressed,
    Gzip,
    Snappy,
    Lz4,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CleanupPolicy {
    pub delete: bool,
    pub compact: bool,
}

/// The configurations that have an effect, typed. -1 means no limit where Kafka says so.
#[derive(Debug, Clone, PartialEq)]
pub struct TopicConfig {
    pub cleanup_policy: CleanupPolicy,
    pub retention_ms: i64,
    pub retention_bytes: i64,
    pub segment_bytes: i32,
    pub segment_ms: i64,
    pub max_message_bytes: i32,
    pub timestamp_type: TimestampType,
    pub timestamp_before_max_ms: i64,
    pub timestamp_after_max_ms: i64,
    pub min_insync_replicas: i32,
    pub compression_type: CompressionType,
    pub durability: Durability,
    pub flush_messages: i64,
    pub flush_ms: i64,
    pub delete_retention_ms: i64,
    pub min_compaction_lag_ms: i64,
    pub max_compaction_lag_ms: i64,
    pub min_cleanable_dirty_ratio: f64,
}

impl Default for TopicConfig {
    fn default() -> Self {
        TopicConfig {
            cleanup_policy: CleanupPolicy { delete: true, compact: false },
            retention_ms: 7 * 24 * 3_600_000,
            retention_bytes: -1,
            segment_bytes: 1 << 30,
            segment_ms: 7 * 24 * 3_600_000,
            max_message_bytes: 1_048_588,
            timestamp_type: TimestampType::CreateTime,
            timestamp_before_max_ms: i64::MAX,
            timestamp_after_max_ms: 3_600_000,
            min_insync_replicas: 1,
            compression_type: CompressionType::Producer,
            durability: Durability::Durable,
            flush_messages: i64::MAX,
            flush_ms: i64::MAX,
            delete_retention_ms: 24 * 3_600_000,
            min_compaction_lag_ms: 0,
            max_compaction_lag_ms: i64::MAX,
            min_cleanable_dirty_ratio: 0.5,
        }
    }
}

impl TopicConfig {
    pub fn deletes(&self) -> bool {
        self.cleanup_policy.delete
    }

    pub fn compacts(&self) -> bool {
        self.cleanup_policy.compact
    }

    /// Of the metadata log itself: on disk before anything else, and never shortened by age or size.
    pub fn metadata_log() -> Self {
        TopicConfig {
            cleanup_policy: CleanupPolicy { delete: false, compact: false },
            retention_ms: -1,
            retention_bytes: -1,
            max_message_bytes: i32::MAX,
            timestamp_after_max_ms: i64::MAX,
            ..TopicConfig::default()
        }
    }

    /// Overrides over broker-level values over defaults. A value that does not parse counts as absent: it can only
    /// come from another release's metadata, and a topic that cannot be served would be the worse answer.
    pub fn resolve(overrides: &BTreeMap<String, String>, layers: &Layers<'_>) -> TopicConfig {
        let mut config = TopicConfig::default();
        for row in TOPIC_CONFIGS {
            if let Some(value) = overrides
                .get(row.def.name)
                .and_then(|value| row.def.normalise(value).ok())
                .or_else(|| broker_level(row, layers).map(|(_, _, value)| value))
            {
                config.set(row.def.name, &value);
            }
        }
        config
    }

    /// `value` is in stored form; names without an effect are ignored.
    fn set(&mut self, name: &str, value: &str) {
        fn put<T: std::str::FromStr>(slot: &mut T, value: &str) {
            if let Ok(parsed) = value.parse() {
                *slot = parsed;
            }
        }
        match name {
            "cleanup.policy" => {
                self.cleanup_policy = CleanupPolicy {
                    delete: list(value).any(|e| e == "delete"),
                    compact: list(value).any(|e| e == "compact"),
                };
            }
            "retention.ms" => put(&mut self.retention_ms, value),
            "retention.bytes" => put(&mut self.retention_bytes, value),
            "segment.bytes" => put(&mut self.segment_bytes, value),
            "segment.ms" => put(&mut self.segment_ms, value),
            "max.message.bytes" => put(&mut self.max_message_bytes, value),
            "message.timestamp.type" => {
                self.timestamp_type = match value {
                    "LogAppendTime" => TimestampType::LogAppendTime,
                    _ => TimestampType::CreateTime,
                };
            }
            "message.timestamp.before.max.ms" => put(&mut self.timestamp_before_max_ms, value),
            "message.timestamp.after.max.ms" => put(&mut self.timestamp_after_max_ms, value),
            "min.insync.replicas" => put(&mut self.min_insync_replicas, value),
            "compression.type" => {
                self.compression_type = match value {
                    "uncompressed" => CompressionType::Uncompressed,
                    "gzip" => CompressionType::Gzip,
                    "snappy" => CompressionType::Snappy,
                    "lz4" => CompressionType::Lz4,
                    "zstd" => CompressionType::Zstd,
                    _ => CompressionType::Producer,
                };
            }
            "flumen.durability" => {
                self.durability = if value == "os" { Durability::Os } else { Durability::Durable };
            }
            "flush.messages" => put(&mut self.flush_messages, value),
            "flush.ms" => put(&mut self.flush_ms, value),
            "delete.retention.ms" => put(&mut self.delete_retention_ms, value),
            "min.compaction.lag.ms" => put(&mut self.min_compaction_lag_ms, value),
            "max.compaction.lag.ms" => put(&mut self.max_compaction_lag_ms, value),
            "min.cleanable.dirty.ratio" => put(&mut self.min_cleanable_dirty_ratio, value),
            _ => {}
        }
    }
}

/// The broker-level value that counts for a topic config: its source, its name and the value in the topic's unit.
pub fn broker_level(
    row: &TopicConfigDef,
    layers: &Layers<'_>,
) -> Option<(ConfigSource, &'static str, String)> {
    for (source, map) in layers.in_order() {
        for (name, factor) in row.synonyms {
            let value = map.get(*name).and_then(|value| in_topic_unit(row, value, *factor));
            if let Some(value) = value {
                return Some((source, name, value));
            }
        }
    }
    None
}

fn in_topic_unit(row: &TopicConfigDef, value: &str, factor: i64) -> Option<String> {
    if factor == 1 {
        return row.def.normalise(value).ok();
    }
    let number: i64 = value.trim().parse().ok()?;
    let converted = if number < 0 { -1 } else { number.saturating_mul(factor) };
    row.def.normalise(&converted.to_string()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker_config::broker_def;

    const NO_VALUES: &BTreeMap<String, String> = &BTreeMap::new();
    const NOTHING: Layers<'static> = Layers { node: None, cluster: NO_VALUES, fixed: NO_VALUES };

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn table_is_sorted_and_its_defaults_are_valid() {
        assert!(TOPIC_CONFIGS.is_sorted_by(|a, b| a.def.name < b.def.name));
        for row in TOPIC_CONFIGS {
            let default = row.def.default.expect("every topic config has a default");
            assert_eq!(row.def.normalise(default).as_deref(), Ok(default), "{}", row.def.name);
            assert!(row.def.doc.ends_with('.'), "{}", row.def.name);
            assert_eq!(topic_def(row.def.name).map(|r| r.def.name), Some(row.def.name));
        }
    }

    #[test]
    fn broker_defaults_are_the_topic_defaults() {
        for row in TOPIC_CONFIGS {
            let mut defaults = BTreeMap::new();
            for (name, _) in row.synonyms {
                let def = broker_def(name).unwrap_or_else(|| panic!("{name} is no broker config"));
                if let Some(default) = def.def.default {
                    defaults.insert(name.to_string(), default.to_string());
                }
            }
            if row.synonyms.is_empty() || defaults.is_empty() {
                continue;
            }
            let layers = Layers { node: None, cluster: NO_VALUES, fixed: &defaults };
            let found = broker_level(row, &layers).map(|(_, _, value)| value);
            assert_eq!(found.as_deref(), row.def.default, "{}", row.def.name);
        }
    }

    #[test]
    fn typed_defaults_are_the_tables() {
        let mut from_table = TopicConfig::metadata_log();
        for row in TOPIC_CONFIGS {
            from_table.set(row.def.name, row.def.default.unwrap_or(""));
        }
        assert_eq!(from_table, TopicConfig::default());
        assert_eq!(TopicConfig::resolve(&BTreeMap::new(), &NOTHING), TopicConfig::default());
    }

    #[test]
    fn overrides_win_over_broker_values_and_units_are_converted() {
        let fixed = map(&[
            ("log.retention.hours", "2"),
            ("flumen.durability", "os"),
            ("log.segment.bytes", "nonsense"),
        ]);
        let cluster = map(&[("log.retention.minutes", "5")]);
        let layers = Layers { node: None, cluster: NO_VALUES, fixed: &fixed };
        let typed = TopicConfig::resolve(&BTreeMap::new(), &layers);
        assert_eq!((typed.retention_ms, typed.durability), (7_200_000, Durability::Os));
        assert_eq!(typed.segment_bytes, 1 << 30);
        let layers = Layers { node: None, cluster: &cluster, fixed: &fixed };
        assert_eq!(TopicConfig::resolve(&BTreeMap::new(), &layers).retention_ms, 300_000);
        let node = map(&[("log.retention.hours", "-1")]);
        let layers = Layers { node: Some(&node), cluster: &cluster, fixed: &fixed };
        assert_eq!(TopicConfig::resolve(&BTreeMap::new(), &layers).retention_ms, -1);
        let overrides = map(&[
            ("retention.ms", "1"),
            ("cleanup.policy", "compact,delete"),
            ("message.timestamp.type", "LogAppendTime"),
        ]);
        let typed = TopicConfig::resolve(&overrides, &layers);
        assert_eq!(typed.retention_ms, 1);
        assert!(typed.compacts() && typed.deletes());
        assert_eq!(typed.timestamp_type, TimestampType::LogAppendTime);
    }

    #[test]
    fn settings_are_refused_with_a_reason() {
        let config = BrokerConfig::default();
        let check = |name: &str, value: &str| check_setting(name, value, &config);
        assert_eq!(check("retention.ms", " 5 "), Ok(Some("5".into())));
        assert_eq!(check("message.format.version", "2.0"), Ok(None));
        assert!(check("retension.ms", "5").unwrap_err().contains("did you mean 'retention.ms'"));
        assert!(check("segment.bytes", "1048575").unwrap_err().contains("at least 1048576"));
        assert!(check("segment.bytes", "1048576").is_ok());
        assert!(check("cleanup.policy", "").is_err() && check("cleanup.policy", "keep").is_err());
        assert!(
            check("compression.gzip.level", "0").is_err() && check("compression.gzip.level", "-1").is_ok()
        );
        assert!(check("remote.storage.enable", "true").unwrap_err().contains("not available"));
        assert!(check("remote.storage.enable", "false").is_ok());
        assert!(check("flumen.durability", "memory").is_err());
        let conflict = map(&[("min.compaction.lag.ms", "10"), ("max.compaction.lag.ms", "9")]);
        assert!(check_together(&conflict, &NOTHING, &config).unwrap_err().contains("larger"));
    }
}
