//! The topic configs that turn an export on: `flumen.clickhouse.*`.
//!
//! Owns names, defaults, parsing and validation; pure, any thread. Invariants: every key the broker lists comes from
//! `CONFIG_KEYS`, and a value that `validate` accepts is accepted by `ExportConfig::from_topic`. Credentials may be
//! inside an endpoint URL; `Debug` never shows them. It does not look at the server.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::column_type::ColumnType;
use crate::mapping::{TimeUnit, UnknownFields};
use crate::table::Column;

pub const PREFIX: &str = "flumen.clickhouse.";

/// Largest block: more rows would no longer be one insert block on the server.
pub const MAX_FLUSH_ROWS: usize = 1_000_000;
/// Largest block in memory.
pub const MAX_FLUSH_BYTES: usize = 200 << 20;

/// Longest text value: the columns of a table of a thousand columns.
pub const MAX_TEXT_BYTES: usize = 64 << 10;

/// Kafka's config value types, as DescribeConfigs reports them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigKind {
    Boolean,
    String,
    /// An unsigned number between two bounds.
    Number {
        min: u64,
        max: u64,
    },
    Choice(&'static [&'static str]),
}

#[derive(Clone, Copy, Debug)]
pub struct ConfigKey {
    pub name: &'static str,
    /// "" means: derived, as the doc says.
    pub default: &'static str,
    pub kind: ConfigKind,
    pub doc: &'static str,
}

const fn key(name: &'static str, default: &'static str, kind: ConfigKind, doc: &'static str) -> ConfigKey {
    ConfigKey { name, default, kind, doc }
}

use ConfigKind::{Boolean, Choice, Number, String as Text};

/// Every key, sorted by name.
pub const CONFIG_KEYS: &[ConfigKey] = &[
    key(
        "flumen.clickhouse.audit.interval.ms",
        "60000",
        Number { min: 0, max: 86_400_000 },
        "How often settled offsets are counted again in ClickHouse; rows lost in a crash of the server are then \
         inserted again. 0 turns it off.",
    ),
    key(
        "flumen.clickhouse.auto.create",
        "false",
        Boolean,
        "Create the table if it does not exist, from flumen.clickhouse.columns or, without it, from the topic's \
         first records.",
    ),
    key(
        "flumen.clickhouse.columns",
        "",
        Text,
        "Columns of the created table, as in CREATE TABLE: `name Type, name Type`.",
    ),
    key(
        "flumen.clickhouse.compression",
        "none",
        Choice(&["none", "lz4"]),
        "Compression of inserts on the way to ClickHouse.",
    ),
    key("flumen.clickhouse.database", "", Text, "Database of the table; by default the endpoint's database."),
    key(
        "flumen.clickhouse.deadletterqueue.topic",
        "",
        Text,
        "Topic for records that the table cannot take, created when needed; by default <topic>.dlq.",
    ),
    key(
        "flumen.clickhouse.delivery",
        "exactly_once",
        Choice(&["exactly_once", "token_only", "at_least_once"]),
        "exactly_once needs a MergeTree table with _partition and _offset; token_only relies on ClickHouse's own \
         deduplication of inserts; at_least_once may repeat rows after a failure.",
    ),
    key("flumen.clickhouse.enable", "false", Boolean, "Export this topic to ClickHouse."),
    key(
        "flumen.clickhouse.endpoint",
        "",
        Text,
        "URL or configured name of the ClickHouse server; by default the broker's clickhouse.url.",
    ),
    key("flumen.clickhouse.engine", "", Text, "Engine of the created table; by default MergeTree."),
    key(
        "flumen.clickhouse.existing.rows",
        "refuse",
        Choice(&["refuse", "trust"]),
        "What to do if a new exactly-once export finds rows of its offsets in the table: refuse to start, or trust \
         that they are this topic's records and insert only those that are missing.",
    ),
    key(
        "flumen.clickhouse.flush.bytes",
        "16777216",
        Number { min: 1 << 10, max: MAX_FLUSH_BYTES as u64 },
        "A block is sent when it holds this many bytes.",
    ),
    key(
        "flumen.clickhouse.flush.rows",
        "100000",
        Number { min: 1, max: MAX_FLUSH_ROWS as u64 },
        "A block is sent when it holds this many rows.",
    ),
    key(
        "flumen.clickhouse.insert.timeout.ms",
        "240000",
        Number { min: 100, max: 3_600_000 },
        "How long an insert may take before its outcome counts as unknown and is looked up.",
    ),
    key(
        "flumen.clickhouse.max.inserts.per.second",
        "10",
        Number { min: 1, max: 100 },
        "Upper bound of inserts per second into the table; every insert makes at least one part.",
    ),
    key(
        "flumen.clickhouse.order.by",
        "",
        Text,
        "Sorting key of the created table; by default (_partition, _offset).",
    ),
    key("flumen.clickhouse.partition.by", "", Text, "Partition key of the created table."),
    key("flumen.clickhouse.paused", "false", Boolean, "Keep the export and its position, but send nothing."),
    key(
        "flumen.clickhouse.server.default.columns",
        "",
        Text,
        "Columns, separated by commas, that are left out of inserts so that the table's DEFAULT fills them.",
    ),
    key("flumen.clickhouse.start", "earliest", Choice(&["earliest", "latest"]), "Where a new export starts."),
    key("flumen.clickhouse.table", "", Text, "Table; by default the topic's name."),
    key(
        "flumen.clickhouse.target.lag.ms",
        "500",
        Number { min: 20, max: 3_600_000 },
        "How old a record may be when it becomes visible in ClickHouse, while the server keeps up.",
    ),
    key(
        "flumen.clickhouse.time.unit",
        "auto",
        Choice(&["auto", "s", "ms", "us", "ns"]),
        "What a whole number in a time column counts since 1970. auto tells seconds, milliseconds, microseconds and \
         nanoseconds apart by the number's size, which is right for every time after 1973. A number with a fraction \
         counts seconds.",
    ),
    key(
        "flumen.clickhouse.tombstones",
        "skip",
        Choice(&["skip", "dlq"]),
        "What becomes of records without a value.",
    ),
    key("flumen.clickhouse.ttl", "", Text, "TTL expression of the created table."),
    key(
        "flumen.clickhouse.unknown.fields",
        "ignore",
        Choice(&["ignore", "dlq"]),
        "What becomes of records with a field that the table has no column for.",
    ),
    key("flumen.clickhouse.value.format", "json", Choice(&["json"]), "Format of record values."),
    key(
        "flumen.clickhouse.views",
        "refuse",
        Choice(&["refuse", "warn"]),
        "Exactly-once into a plain MergeTree with materialized views: refuse, or keep the promise for the table alone.",
    ),
];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("unknown topic config {name}{}", nearest.as_deref().map(|n| format!("; did you mean {n}?")).unwrap_or_default())]
    Unknown { name: String, nearest: Option<String> },
    #[error("{name}: {reason}")]
    Invalid { name: String, reason: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    ExactlyOnce,
    TokenOnly,
    AtLeastOnce,
}

impl Delivery {
    pub fn as_str(self) -> &'static str {
        match self {
            Delivery::ExactlyOnce => "exactly_once",
            Delivery::TokenOnly => "token_only",
            Delivery::AtLeastOnce => "at_least_once",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Earliest,
    Latest,
}

/// An endpoint as configured: a URL or a name. May hold a password, so it is never printed whole.
#[derive(Clone, PartialEq, Eq)]
pub struct EndpointRef(pub String);

impl fmt::Debug for EndpointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact_url(&self.0))
    }
}

/// The URL without user, password and query.
pub fn redact_url(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or("");
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let authority_end = rest.find('/').unwrap_or(rest.len());
            let (authority, path) = rest.split_at(authority_end);
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            format!("{scheme}://{host}{path}")
        }
        None => url.rsplit_once('@').map_or(url, |(_, host)| host).to_owned(),
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct ExportConfig {
    pub topic: String,
    /// `None`: the broker's `clickhouse.url`.
    pub endpoint: Option<EndpointRef>,
    /// `None`: the endpoint's database.
    pub database: Option<String>,
    pub table: String,
    pub delivery: Delivery,
    pub start: Start,
    pub unknown_fields: UnknownFields,
    pub auto_create: bool,
    pub columns: Option<Vec<Column>>,
    pub engine: Option<String>,
    pub order_by: Option<String>,
    pub partition_by: Option<String>,
    pub ttl: Option<String>,
    pub target_lag_ms: u64,
    pub flush_rows: usize,
    pub flush_bytes: usize,
    pub max_inserts_per_second: u64,
    pub dead_letter_topic: String,
    pub insert_timeout_ms: u64,
    pub paused: bool,
    pub tombstones_to_dead_letters: bool,
    pub time_unit: TimeUnit,
    pub trust_existing_rows: bool,
    pub server_default_columns: Vec<String>,
    pub audit_interval_ms: u64,
    pub compress: bool,
    /// Exactly-once holds for the table, and the operator accepts that it does not for its views.
    pub views_may_differ: bool,
}

impl ExportConfig {
    /// The export that a topic's configs ask for; `None` if it is not enabled. Keys outside `flumen.clickhouse.` are
    /// not looked at; an unknown one inside it is an error even while the export is off.
    pub fn from_topic(
        topic: &str,
        configs: &BTreeMap<String, String>,
    ) -> Result<Option<ExportConfig>, ConfigError> {
        let mut values = Values { configs };
        for (name, value) in configs.range(PREFIX.to_owned()..) {
            if !name.starts_with(PREFIX) {
                break;
            }
            check(name, value)?;
        }
        if !values.boolean("enable") {
            return Ok(None);
        }
        let columns = match values.text("columns") {
            Some(text) => Some(parse_columns(&text).map_err(|reason| invalid("columns", reason))?),
            None => None,
        };
        Ok(Some(ExportConfig {
            topic: topic.to_owned(),
            endpoint: values.text("endpoint").map(EndpointRef),
            database: values.text("database"),
            table: values.text("table").unwrap_or_else(|| topic.to_owned()),
            delivery: match values.word("delivery").as_str() {
                "token_only" => Delivery::TokenOnly,
                "at_least_once" => Delivery::AtLeastOnce,
                _ => Delivery::ExactlyOnce,
            },
            start: if values.word("start") == "latest" { Start::Latest } else { Start::Earliest },
            unknown_fields: if values.word("unknown.fields") == "dlq" {
                UnknownFields::DeadLetter
            } else {
                UnknownFields::Ignore
            },
            auto_create: values.boolean("auto.create"),
            columns,
            engine: values.text("engine"),
            order_by: values.text("order.by"),
            partition_by: values.text("partition.by"),
            ttl: values.text("ttl"),
            target_lag_ms: values.number("target.lag.ms"),
            flush_rows: values.number("flush.rows") as usize,
            flush_bytes: values.number("flush.bytes") as usize,
            max_inserts_per_second: values.number("max.inserts.per.second"),
            dead_letter_topic: values.text("deadletterqueue.topic").unwrap_or_else(|| format!("{topic}.dlq")),
            insert_timeout_ms: values.number("insert.timeout.ms"),
            paused: values.boolean("paused"),
            tombstones_to_dead_letters: values.word("tombstones") == "dlq",
            time_unit: match values.word("time.unit").as_str() {
                "s" => TimeUnit::Seconds,
                "ms" => TimeUnit::Milliseconds,
                "us" => TimeUnit::Microseconds,
                "ns" => TimeUnit::Nanoseconds,
                _ => TimeUnit::BySize,
            },
            trust_existing_rows: values.word("existing.rows") == "trust",
            server_default_columns: values
                .text("server.default.columns")
                .map(|text| split_names(&text))
                .unwrap_or_default(),
            audit_interval_ms: values.number("audit.interval.ms"),
            compress: values.word("compression") == "lz4",
            views_may_differ: values.word("views") == "warn",
        }))
    }
}

/// Reads values that `check` has accepted, or their defaults.
struct Values<'a> {
    configs: &'a BTreeMap<String, String>,
}

impl Values<'_> {
    fn word(&mut self, name: &str) -> String {
        let full = format!("{PREFIX}{name}");
        let default = find(&full).map_or("", |key| key.default);
        self.configs.get(&full).map_or(default, String::as_str).trim().to_owned()
    }

    fn text(&mut self, name: &str) -> Option<String> {
        Some(self.word(name)).filter(|text| !text.is_empty())
    }

    fn boolean(&mut self, name: &str) -> bool {
        self.word(name).eq_ignore_ascii_case("true")
    }

    fn number(&mut self, name: &str) -> u64 {
        // `check` has shown that it parses, and so do the defaults (a test says so).
        self.word(name).parse().unwrap_or(0)
    }
}

fn find(name: &str) -> Option<&'static ConfigKey> {
    CONFIG_KEYS.iter().find(|key| key.name == name)
}

fn invalid(name: &str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { name: format!("{PREFIX}{name}"), reason: reason.into() }
}

fn check(name: &str, value: &str) -> Result<(), ConfigError> {
    let Some(key) = find(name) else {
        return Err(ConfigError::Unknown { name: name.to_owned(), nearest: nearest(name) });
    };
    let bad = |reason: String| Err(ConfigError::Invalid { name: name.to_owned(), reason });
    let value = value.trim();
    match key.kind {
        Boolean => {
            if !value.eq_ignore_ascii_case("true") && !value.eq_ignore_ascii_case("false") {
                return bad(format!("{value:?} is neither true nor false"));
            }
        }
        Number { min, max } => match value.parse::<u64>() {
            Ok(number) if (min..=max).contains(&number) => {}
            _ => return bad(format!("{value:?} is not a whole number from {min} to {max}")),
        },
        Choice(choices) => {
            if !choices.contains(&value) {
                return bad(format!("{value:?} is not one of {}", choices.join(", ")));
            }
        }
        Text => {
            if value.len() > MAX_TEXT_BYTES {
                return bad(format!("is {} bytes long; at most {MAX_TEXT_BYTES} are taken", value.len()));
            }
            if value.contains('\0') {
                return bad("contains a zero byte".to_owned());
            }
        }
    }
    match name {
        "flumen.clickhouse.columns" if !value.is_empty() => {
            if let Err(reason) = parse_columns(value) {
                return bad(reason);
            }
        }
        "flumen.clickhouse.deadletterqueue.topic" if !value.is_empty() => {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if value.len() > 249 || value == "." || value == ".." || !value.chars().all(legal) {
                return bad(format!("{value:?} is not a topic name"));
            }
        }
        "flumen.clickhouse.endpoint" if value.contains("://") => {
            if !value.starts_with("http://") && !value.starts_with("https://") {
                return bad("the URL must start with http:// or https://".to_owned());
            }
        }
        _ => {}
    }
    Ok(())
}

/// Whether the broker may accept this value of a topic config under `flumen.clickhouse.`. The text says why not.
pub fn validate(name: &str, value: &str) -> Result<(), String> {
    check(name, value).map_err(|e| e.to_string())
}

/// The known key closest to a mistyped one, if any is close.
pub fn nearest(name: &str) -> Option<String> {
    // A third of the letters wrong is no longer a typing mistake.
    let limit = name.len().saturating_sub(PREFIX.len()) / 3 + 2;
    CONFIG_KEYS
        .iter()
        .map(|key| (edit_distance(name, key.name), key.name))
        .min()
        .filter(|(distance, _)| *distance <= limit)
        .map(|(_, name)| name.to_owned())
}

fn edit_distance(a: &str, b: &str) -> usize {
    // A name longer than this is not a mistyped key.
    const MAX_CHARS: usize = 200;
    let a: Vec<char> = a.chars().take(MAX_CHARS).collect();
    let b: Vec<char> = b.chars().take(MAX_CHARS).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn split_names(text: &str) -> Vec<String> {
    text.split(',')
        .map(|name| name.trim().trim_matches('`').to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// Columns as in CREATE TABLE, without defaults: `id Int64, tags Array(String)`, names optionally in backticks.
pub fn parse_columns(text: &str) -> Result<Vec<Column>, String> {
    let mut columns = Vec::new();
    let mut names = BTreeSet::new();
    for item in split_top_level(text)? {
        let item = item.trim();
        if item.is_empty() {
            return Err("a column is missing between two commas".to_owned());
        }
        let (name, ty) = match item.strip_prefix('`') {
            Some(rest) => {
                rest.split_once('`').ok_or_else(|| format!("{item:?} lacks the closing backtick"))?
            }
            None => item
                .split_once(char::is_whitespace)
                .ok_or_else(|| format!("{item:?} is not a name and a type"))?,
        };
        if name.is_empty() {
            return Err(format!("{item:?} has no name"));
        }
        if !names.insert(name.to_owned()) {
            return Err(format!("column {name} occurs twice"));
        }
        let ty = ColumnType::parse(ty.trim()).map_err(|e| format!("column {name}: {e}"))?;
        columns.push(Column::new(name, ty));
    }
    Ok(columns)
}

/// Splits at commas that are in no parenthesis and no quote.
fn split_top_level(text: &str) -> Result<Vec<&str>, String> {
    let mut parts = Vec::new();
    let (mut start, mut depth) = (0, 0usize);
    let mut quote: Option<char> = None;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if let Some(open) = quote {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if c == open => quote = None,
                _ => {}
            }
            continue;
        }
        match c {
            '\'' | '`' | '"' => quote = Some(c),
            '(' => depth += 1,
            ')' => depth = depth.checked_sub(1).ok_or("a ) has no (")?,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quote.is_some() || depth > 0 {
        return Err("a quote or parenthesis is not closed".to_owned());
    }
    parts.push(&text[start..]);
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (format!("{PREFIX}{k}"), (*v).to_owned())).collect()
    }

    #[test]
    fn defaults_are_valid_and_sorted() {
        for key in CONFIG_KEYS {
            if !key.default.is_empty() {
                assert_eq!(validate(key.name, key.default), Ok(()), "{}", key.name);
            }
        }
        assert!(CONFIG_KEYS.windows(2).all(|w| w[0].name < w[1].name));
    }

    #[test]
    fn off_unless_enabled() {
        assert_eq!(ExportConfig::from_topic("t", &BTreeMap::new()), Ok(None));
        assert_eq!(ExportConfig::from_topic("t", &configs(&[("table", "x")])), Ok(None));
        let other = BTreeMap::from([("retention.ms".to_owned(), "1".to_owned())]);
        assert_eq!(ExportConfig::from_topic("t", &other), Ok(None));
    }

    #[test]
    fn reads_what_is_set_and_derives_the_rest() {
        let config = ExportConfig::from_topic(
            "orders",
            &configs(&[
                ("enable", "true"),
                ("endpoint", "http://user:secret@ch:8123/?password=p"),
                ("columns", "id Int64, `at day` DateTime64(3, 'UTC'), price Decimal(10, 2)"),
                ("target.lag.ms", "1000"),
                ("unknown.fields", "dlq"),
            ]),
        )
        .unwrap()
        .unwrap();
        assert_eq!((config.table.as_str(), config.dead_letter_topic.as_str()), ("orders", "orders.dlq"));
        assert_eq!(config.delivery, Delivery::ExactlyOnce);
        assert_eq!((config.target_lag_ms, config.flush_rows), (1000, 100_000));
        assert_eq!(config.unknown_fields, UnknownFields::DeadLetter);
        let columns: Vec<String> =
            config.columns.as_ref().unwrap().iter().map(|c| format!("{} {}", c.name, c.ty)).collect();
        assert_eq!(columns, ["id Int64", "at day DateTime64(3, 'UTC')", "price Decimal(10, 2)"]);
        let shown = format!("{config:?}");
        assert!(
            shown.contains("http://ch:8123/") && !shown.contains("secret") && !shown.contains("password")
        );
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let err = |k: &str, v: &str| validate(&format!("{PREFIX}{k}"), v).unwrap_err();
        assert_eq!(
            err("tabel", "x"),
            "unknown topic config flumen.clickhouse.tabel; did you mean flumen.clickhouse.table?"
        );
        assert!(err("entirely.different.thing", "x").ends_with("entirely.different.thing"));
        assert!(err("enable", "yes").contains("neither true nor false"));
        assert!(err("flush.rows", "0").contains("from 1 to 1000000"));
        assert!(err("flush.rows", "99999999999999999999999").contains("whole number"));
        assert!(err("delivery", "twice").contains("exactly_once, token_only, at_least_once"));
        assert!(err("columns", "a Int8, a Int8").contains("twice"));
        assert!(err("columns", "a Integer8").contains("column a"));
        assert!(err("columns", "a Array(Int8").contains("not closed"));
        assert!(err("endpoint", "tcp://x").contains("http://"));
        assert!(err("deadletterqueue.topic", "a b").contains("topic name"));
        assert!(err("order.by", &"x".repeat(MAX_TEXT_BYTES + 1)).contains("at most 65536"));
        assert!(
            ExportConfig::from_topic("t", &configs(&[("enabel", "true")]))
                .unwrap_err()
                .to_string()
                .contains("flumen.clickhouse.enable?")
        );
    }

    #[test]
    fn urls_lose_their_secrets() {
        assert_eq!(redact_url("http://u:p@h:1/x?y=z"), "http://h:1/x");
        assert_eq!(redact_url("http://u:p@ss@h"), "http://h");
        assert_eq!(redact_url("named"), "named");
    }
}
