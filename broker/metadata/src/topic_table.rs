//! The table of topic configurations: Kafka's names, types, defaults and limits, and `flumen.durability`.

use crate::config_def::{Check, ConfigDef, ConfigKind, at_least};
use crate::throttled::ThrottledReplicas;

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
pub(crate) const DURABILITIES: &[&str] = &["durable", "memory", "os"];
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
        "When records are acknowledged: 'durable' once the disk has them (survives power loss), 'os' once the kernel has them (survives a killed process, as Kafka's default), 'memory' once the process has them (a killed process loses its last records).",
    ),
    row(
        "flush.messages",
        ConfigKind::Long,
        LONG_MAX,
        at_least(1),
        R,
        &[("log.flush.interval.messages", 1)],
        "Records after which the log is forced to disk under flumen.durability=os or memory; 1 makes the topic durable, under which every acknowledged record already is.",
    ),
    row(
        "flush.ms",
        ConfigKind::Long,
        LONG_MAX,
        at_least(0),
        H,
        &[("log.flush.interval.ms", 1)],
        "Time (ms) after which the log is forced to disk under flumen.durability=os or memory; 0 makes the topic durable.",
    ),
    row(
        "follower.replication.throttled.replicas",
        ConfigKind::List,
        "",
        Check::With(ThrottledReplicas::check),
        H,
        &[],
        "Replicas that get what they lack no faster than follower.replication.throttled.rate of their broker, as partition:broker,... or '*' for all.",
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
        Check::With(ThrottledReplicas::check),
        H,
        &[],
        "Replicas that, when they lead, send to those that are not in sync no faster than leader.replication.throttled.rate of their broker, as partition:broker,... or '*' for all.",
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
