//! Topic configurations: checking what a client sets, and putting overrides, broker values and defaults together.
//!
//! `TopicConfig` is the typed form of what has an effect; everything else is stored and reported. Keys that belong
//! to other parts of the broker come in as [`ExtraConfig`]s.

use std::collections::BTreeMap;

use crate::broker_config::BrokerConfig;
use crate::config_def::{ConfigDef, ConfigSource, Layers, list, suggestion};
use crate::throttled::ThrottledReplicas;
use crate::topic_table::{TOPIC_CONFIGS, TopicConfigDef, is_removed, topic_def};

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
    /// The process has the records.
    Memory,
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
    pub leader_throttled: ThrottledReplicas,
    pub follower_throttled: ThrottledReplicas,
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
            leader_throttled: ThrottledReplicas::default(),
            follower_throttled: ThrottledReplicas::default(),
        }
    }
}

impl TopicConfig {
    pub fn deletes(&self) -> bool {
        self.cleanup_policy.delete
    }

    /// When a record is acknowledged. A topic that forces its log to disk after every record, or at once, is durable
    /// whatever else it says: that is what those who set it want from Kafka.
    pub fn acknowledges(&self) -> Durability {
        if self.flush_messages <= 1 || self.flush_ms <= 0 { Durability::Durable } else { self.durability }
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
            // What snapshots stand for goes in whole segments.
            segment_bytes: 16 << 20,
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
                self.durability = match value {
                    "os" => Durability::Os,
                    "memory" => Durability::Memory,
                    _ => Durability::Durable,
                };
            }
            "flush.messages" => put(&mut self.flush_messages, value),
            "flush.ms" => put(&mut self.flush_ms, value),
            "delete.retention.ms" => put(&mut self.delete_retention_ms, value),
            "min.compaction.lag.ms" => put(&mut self.min_compaction_lag_ms, value),
            "max.compaction.lag.ms" => put(&mut self.max_compaction_lag_ms, value),
            "min.cleanable.dirty.ratio" => put(&mut self.min_cleanable_dirty_ratio, value),
            "leader.replication.throttled.replicas" => {
                self.leader_throttled = ThrottledReplicas::parse(value).unwrap_or_default();
            }
            "follower.replication.throttled.replicas" => {
                self.follower_throttled = ThrottledReplicas::parse(value).unwrap_or_default();
            }
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
    use crate::broker_table::broker_def;

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
    fn forcing_every_record_to_disk_is_durable() {
        let resolve = |pairs: &[(&str, &str)]| TopicConfig::resolve(&map(pairs), &NOTHING).acknowledges();
        assert_eq!(resolve(&[]), Durability::Durable);
        assert_eq!(resolve(&[("flumen.durability", "os"), ("flush.messages", "2")]), Durability::Os);
        assert_eq!(resolve(&[("flumen.durability", "memory"), ("flush.ms", "1")]), Durability::Memory);
        assert_eq!(resolve(&[("flumen.durability", "os"), ("flush.messages", "1")]), Durability::Durable);
        assert_eq!(resolve(&[("flumen.durability", "memory"), ("flush.ms", "0")]), Durability::Durable);
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
        assert!(check("cleanup.policy", "").is_ok() && check("cleanup.policy", "keep").is_err());
        assert!(
            check("compression.gzip.level", "0").is_err() && check("compression.gzip.level", "-1").is_ok()
        );
        assert!(check("remote.storage.enable", "true").unwrap_err().contains("not available"));
        assert!(check("remote.storage.enable", "false").is_ok());
        assert!(check("flumen.durability", "memory").is_ok());
        assert!(check("flumen.durability", "disk").is_err());
        let conflict = map(&[("min.compaction.lag.ms", "10"), ("max.compaction.lag.ms", "9")]);
        assert!(check_together(&conflict, &NOTHING, &config).unwrap_err().contains("larger"));
    }
}
