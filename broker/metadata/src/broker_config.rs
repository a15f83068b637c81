//! The broker's own configurations in the typed form the process starts with.
//!
//! Names, defaults and units are Kafka's where Kafka has them. Names that mean nothing here are accepted, so that
//! an existing `server.properties` can be used, and reported as such.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use crate::broker_table::{BROKER_CONFIGS, broker_def};
use crate::config_def::{ExtraConfig, Layers, suggestion};
use crate::image::MetadataImage;
use crate::topic_config::check_together;
use crate::topic_table::topic_def;

pub(crate) fn check_advertised(value: &str) -> Result<(), String> {
    parse_listener(value).map(|_| ())
}

pub(crate) fn check_url(value: &str) -> Result<(), String> {
    if value.starts_with("http://") || value.starts_with("https://") {
        return Ok(());
    }
    Err("must start with http:// or https://".into())
}

/// Host and port of the first of `NAME://host:port,...`.
fn parse_listener(value: &str) -> Result<(String, u16), String> {
    const FORM: &str = "must look like PLAINTEXT://host:port";
    let first = value.split(',').next().unwrap_or("").trim();
    let (_, address) = first.split_once("://").ok_or(FORM)?;
    let (host, port) = address.rsplit_once(':').ok_or(FORM)?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().map_err(|_| format!("{FORM}; '{port}' is no port"))?;
    if host.is_empty() || host == "0.0.0.0" || host == "::" {
        return Err(format!("{FORM}; clients cannot connect to '{host}'"));
    }
    Ok((host.to_string(), port))
}

/// A value that must not appear in logs or answers.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Secret(value.into())
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[hidden]")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("unknown configuration '{key}'{suggestion}")]
    Unknown { key: String, suggestion: String },
    #[error("'{key}' is a topic configuration; its default for all topics is set by '{broker_key}'")]
    TopicKey { key: String, broker_key: &'static str },
    #[error("configuration '{key}' cannot be '{value}': {reason}")]
    Invalid { key: String, value: String, reason: String },
    #[error("configurations contradict each other: {0}")]
    Conflict(String),
}

/// A rule over all overrides of a topic; the text says why they do not go together.
pub type TopicCheck = fn(&BTreeMap<String, String>) -> Result<(), String>;

/// What the broker was started with, typed. `values` holds every key that was given, secrets excepted.
#[derive(Debug, Clone)]
pub struct BrokerConfig {
    pub node_id: i32,
    pub rack: Option<String>,
    pub advertised_listener: Option<(String, u16)>,
    pub num_partitions: i32,
    pub default_replication_factor: i16,
    pub auto_create_topics_enable: bool,
    pub delete_topic_enable: bool,
    pub message_max_bytes: i32,
    pub offsets_retention_ms: i64,
    pub offsets_topic_num_partitions: i32,
    pub offsets_topic_replication_factor: i16,
    pub offsets_topic_segment_bytes: i32,
    pub offset_metadata_max_bytes: usize,
    pub group_initial_rebalance_delay_ms: i64,
    pub group_min_session_timeout_ms: i32,
    pub group_max_session_timeout_ms: i32,
    pub group_max_size: usize,
    pub transaction_max_timeout_ms: i32,
    pub producer_id_expiration_ms: i64,
    /// Negative: idle connections stay.
    pub connections_max_idle_ms: i64,
    pub log_cleaner_enable: bool,
    pub clickhouse_url: Option<String>,
    pub clickhouse_user: String,
    pub clickhouse_password: Option<Secret>,
    pub clickhouse_database: String,
    pub values: BTreeMap<String, String>,
    /// Topic configurations of other parts of the broker.
    pub topic_extras: &'static [ExtraConfig],
    /// What the overrides of a topic must satisfy together, beyond the rules known here.
    pub topic_check: Option<TopicCheck>,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        BrokerConfig::from_map(&BTreeMap::new())
            .expect("the defaults of the table are valid, which a test shows")
    }
}

/// Values in stored form, with the table's defaults behind them.
struct Values<'a>(&'a BTreeMap<String, String>);

impl Values<'_> {
    fn text(&self, name: &'static str) -> Option<&str> {
        self.0.get(name).map(String::as_str).or_else(|| broker_def(name).and_then(|row| row.def.default))
    }

    /// Both the table's defaults and checked values parse, so the fallback is never taken.
    fn number<T: std::str::FromStr + Default>(&self, name: &'static str) -> T {
        self.text(name).and_then(|text| text.parse().ok()).unwrap_or_default()
    }
}

impl BrokerConfig {
    pub fn from_map(given: &BTreeMap<String, String>) -> Result<BrokerConfig, ConfigError> {
        let mut values = BTreeMap::new();
        let mut password = None;
        for (key, value) in given {
            let normal = check_broker_setting(key, value)?;
            if broker_def(key).is_some_and(|row| row.def.is_sensitive()) {
                password = Some(Secret(normal)).filter(|secret| !secret.0.is_empty());
            } else {
                values.insert(key.clone(), normal);
            }
        }
        let v = Values(&values);
        let node_id = if values.contains_key("node.id") { "node.id" } else { "broker.id" };
        let node_id =
            values.get(node_id).and_then(|id| id.parse().ok()).unwrap_or_else(|| v.number("node.id"));
        let advertised_listener =
            v.text("advertised.listeners").map(parse_listener).transpose().map_err(ConfigError::Conflict)?;
        let some = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_string);
        let config = BrokerConfig {
            node_id,
            rack: some(v.text("broker.rack")),
            advertised_listener,
            num_partitions: v.number("num.partitions"),
            default_replication_factor: v.number("default.replication.factor"),
            auto_create_topics_enable: v.number("auto.create.topics.enable"),
            delete_topic_enable: v.number("delete.topic.enable"),
            message_max_bytes: v.number("message.max.bytes"),
            offsets_retention_ms: v.number::<i64>("offsets.retention.minutes").saturating_mul(60_000),
            offsets_topic_num_partitions: v.number("offsets.topic.num.partitions"),
            offsets_topic_replication_factor: v.number("offsets.topic.replication.factor"),
            offsets_topic_segment_bytes: v.number("offsets.topic.segment.bytes"),
            offset_metadata_max_bytes: v.number("offset.metadata.max.bytes"),
            group_initial_rebalance_delay_ms: v.number("group.initial.rebalance.delay.ms"),
            group_min_session_timeout_ms: v.number("group.min.session.timeout.ms"),
            group_max_session_timeout_ms: v.number("group.max.session.timeout.ms"),
            group_max_size: v.number("group.max.size"),
            transaction_max_timeout_ms: v.number("transaction.max.timeout.ms"),
            producer_id_expiration_ms: v.number("producer.id.expiration.ms"),
            connections_max_idle_ms: v.number("connections.max.idle.ms"),
            log_cleaner_enable: v.number("log.cleaner.enable"),
            clickhouse_url: some(v.text("clickhouse.url")),
            clickhouse_user: v.text("clickhouse.user").unwrap_or("default").to_string(),
            clickhouse_password: password,
            clickhouse_database: v.text("clickhouse.database").unwrap_or("default").to_string(),
            values,
            topic_extras: &[],
            topic_check: None,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.group_min_session_timeout_ms > self.group_max_session_timeout_ms {
            return Err(ConfigError::Conflict(format!(
                "group.min.session.timeout.ms ({}) is larger than group.max.session.timeout.ms ({})",
                self.group_min_session_timeout_ms, self.group_max_session_timeout_ms
            )));
        }
        let no_values = BTreeMap::new();
        let layers = Layers { node: None, cluster: &no_values, fixed: &self.values };
        check_together(&no_values, &layers, self).map_err(ConfigError::Conflict)
    }

    /// Adds the topic configurations of another part of the broker.
    pub fn with_topic_extras(mut self, extras: &'static [ExtraConfig]) -> Self {
        self.topic_extras = extras;
        self
    }

    pub fn with_topic_check(mut self, check: TopicCheck) -> Self {
        self.topic_check = Some(check);
        self
    }

    /// With what was altered while the broker ran.
    pub fn with_dynamic(&self, image: &MetadataImage) -> Cow<'_, BrokerConfig> {
        let of_node = image.node_configs.get(&image.node.id);
        if image.broker_configs.is_empty() && of_node.is_none() {
            return Cow::Borrowed(self);
        }
        let mut values = self.values.clone();
        for (key, value) in image.broker_configs.iter().chain(of_node.into_iter().flatten()) {
            // Another release may have left what this one does not know.
            if check_broker_setting(key, value).is_ok() {
                values.insert(key.clone(), value.clone());
            }
        }
        match BrokerConfig::from_map(&values) {
            Ok(config) => Cow::Owned(BrokerConfig {
                clickhouse_password: self.clickhouse_password.clone(),
                topic_extras: self.topic_extras,
                topic_check: self.topic_check,
                ..config
            }),
            Err(_) => Cow::Borrowed(self),
        }
    }

    /// As [`Self::with_dynamic`] would say, without building it: Metadata asks for every request.
    pub(crate) fn may_auto_create(&self, image: &MetadataImage) -> bool {
        dynamic_value(image, "auto.create.topics.enable")
            .and_then(|value| value.parse().ok())
            .unwrap_or(self.auto_create_topics_enable)
    }

    /// The number that counts just now, without building everything else: what was altered while the broker ran, what it was
    /// started with, or the default. A limit that nobody has set is none.
    pub fn number_now(&self, image: &MetadataImage, name: &'static str) -> Option<i64> {
        let parsed = |value: &String| value.parse().ok();
        let given =
            dynamic_value(image, name).and_then(parsed).or_else(|| self.values.get(name).and_then(parsed));
        let default = || broker_def(name)?.def.default?.parse().ok().filter(|number| *number != i64::MAX);
        given.or_else(default)
    }

    /// How long a connection may be silent.
    pub fn connections_max_idle(&self) -> Option<Duration> {
        u64::try_from(self.connections_max_idle_ms).ok().map(Duration::from_millis)
    }

    /// What clients are told to connect to when the broker listens on `listening`.
    pub fn advertised(&self, listening: SocketAddr) -> (String, u16) {
        if let Some((host, port)) = &self.advertised_listener {
            return (host.clone(), if *port == 0 { listening.port() } else { *port });
        }
        let ip = listening.ip();
        let host = match ip {
            _ if !ip.is_unspecified() => ip.to_string(),
            // Bound to all addresses, and none was named: the one that at least works on this host.
            std::net::IpAddr::V4(_) => "127.0.0.1".to_string(),
            std::net::IpAddr::V6(_) => "::1".to_string(),
        };
        (host, listening.port())
    }
}

/// What was altered while the broker ran.
fn dynamic_value<'a>(image: &'a MetadataImage, name: &str) -> Option<&'a String> {
    let of_node = image.node_configs.get(&image.node.id).and_then(|configs| configs.get(name));
    of_node.or_else(|| image.broker_configs.get(name))
}

/// The value in its stored form.
pub fn check_broker_setting(key: &str, value: &str) -> Result<String, ConfigError> {
    let Some(row) = broker_def(key) else {
        let topic_key = topic_def(key).and_then(|row| row.synonyms.first());
        if let Some((broker_key, _)) = topic_key {
            return Err(ConfigError::TopicKey { key: key.to_string(), broker_key });
        }
        let suggestion = suggestion(key, BROKER_CONFIGS.iter().map(|row| row.def.name));
        return Err(ConfigError::Unknown { key: key.to_string(), suggestion });
    };
    row.def.normalise(value).map_err(|reason| ConfigError::Invalid {
        key: key.to_string(),
        value: if row.def.is_sensitive() { "[hidden]".into() } else { value.to_string() },
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<BrokerConfig, ConfigError> {
        BrokerConfig::from_map(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn table_is_sorted_and_its_defaults_are_valid() {
        assert!(BROKER_CONFIGS.is_sorted_by(|a, b| a.def.name < b.def.name));
        for row in BROKER_CONFIGS {
            assert!(row.def.doc.ends_with('.'), "{}", row.def.name);
            if let Some(default) = row.def.default {
                assert_eq!(row.def.normalise(default).as_deref(), Ok(default), "{}", row.def.name);
            }
        }
        for name in crate::broker_table::SYNONYM_GROUPS.iter().flat_map(|group| group.iter()) {
            assert!(broker_def(name).is_some(), "{name}");
        }
    }

    #[test]
    fn defaults_and_given_values_are_typed() {
        let config = BrokerConfig::default();
        assert_eq!((config.node_id, config.num_partitions, config.default_replication_factor), (1, 1, 1));
        assert_eq!(config.offsets_topic_num_partitions, 16);
        assert_eq!(config.offsets_retention_ms, 604_800_000);
        assert!(config.auto_create_topics_enable && config.delete_topic_enable);
        assert_eq!(config.group_max_size, 2_147_483_647);
        assert!(config.clickhouse_url.is_none() && config.rack.is_none());
        let config = parse(&[
            ("broker.id", "7"),
            ("num.partitions", " 4 "),
            ("auto.create.topics.enable", "FALSE"),
            ("offsets.retention.minutes", "2"),
            ("clickhouse.url", "http://localhost:8123"),
            ("broker.rack", "r1"),
            ("num.io.threads", "2"),
        ])
        .unwrap();
        assert_eq!((config.node_id, config.num_partitions), (7, 4));
        assert!(!config.auto_create_topics_enable);
        assert_eq!(config.offsets_retention_ms, 120_000);
        assert_eq!(config.clickhouse_url.as_deref(), Some("http://localhost:8123"));
        assert_eq!(config.rack.as_deref(), Some("r1"));
        assert_eq!(parse(&[("broker.id", "7"), ("node.id", "8")]).unwrap().node_id, 8);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |pairs: &[(&str, &str)]| parse(pairs).unwrap_err().to_string();
        assert_eq!(
            error(&[("num.partition", "4")]),
            "unknown configuration 'num.partition'; did you mean 'num.partitions'?"
        );
        assert!(error(&[("retention.ms", "4")]).contains("'log.retention.ms'"));
        assert!(error(&[("num.partitions", "many")]).contains("whole number"));
        assert!(error(&[("num.partitions", "0")]).contains("at least 1"));
        assert!(error(&[("clickhouse.url", "localhost:8123")]).contains("http://"));
        assert!(error(&[("group.min.session.timeout.ms", "9999999")]).contains("larger than"));
        assert!(
            error(&[("log.cleaner.min.compaction.lag.ms", "5"), ("log.cleaner.max.compaction.lag.ms", "4")])
                .contains("larger than")
        );
        for bad in
            ["host:9092", "PLAINTEXT://host", "PLAINTEXT://:9092", "PLAINTEXT://0.0.0.0:1", "X://h:99999"]
        {
            assert!(parse(&[("advertised.listeners", bad)]).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_are_kept_out_of_sight() {
        let config = parse(&[("clickhouse.password", "hunter2")]).unwrap();
        assert_eq!(config.clickhouse_password.as_ref().map(Secret::reveal), Some("hunter2"));
        assert!(!format!("{config:?}").contains("hunter2"));
        assert!(!config.values.contains_key("clickhouse.password"));
    }

    #[test]
    fn advertised_address_is_one_that_can_be_connected_to() {
        let listening = |text: &str| text.parse::<SocketAddr>().unwrap();
        let plain = BrokerConfig::default();
        assert_eq!(plain.advertised(listening("10.0.0.5:9092")), ("10.0.0.5".into(), 9092));
        assert_eq!(plain.advertised(listening("0.0.0.0:9092")), ("127.0.0.1".into(), 9092));
        let named = parse(&[("advertised.listeners", "PLAINTEXT://broker.example:0,X://y:1")]).unwrap();
        assert_eq!(named.advertised(listening("0.0.0.0:5555")), ("broker.example".into(), 5555));
        let v6 = parse(&[("advertised.listeners", "PLAINTEXT://[fd00::1]:7")]).unwrap();
        assert_eq!(v6.advertised(listening("0.0.0.0:1")), ("fd00::1".into(), 7));
    }
}
