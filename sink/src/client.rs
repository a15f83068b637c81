//! Calls to one ClickHouse server over the official client.
//!
//! Owns the endpoint, the settings pinned on every insert, and the error that every call returns. Runs on the export
//! thread. Invariants: no credential ever gets into an error, a log line or a `Debug` output; an insert is one request
//! with one block; settings a server does not know are not sent. It does not retry and does not judge outcomes.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::redact_url;
use crate::ddl::{quote_ident, quote_string};
use crate::plan::Range;
use crate::settle::classify::{exception_code, hint};
use crate::settle::{Class, Failure, Found, classify};

/// How long a query about the server's own state may take.
const QUERY_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection that takes longer is down for our purposes; the first packet of a probe comes within it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Ranges in one read-back statement: keeps it far below the server's `max_query_size` (256 KiB).
const RANGES_PER_QUERY: usize = 500;
/// Longest text kept of a server's error.
const MAX_ERROR_CHARS: usize = 2000;
/// Above any batch, so that the server neither splits nor joins blocks.
const BLOCK_ROWS_LIMIT: &str = "10000000";
const BLOCK_BYTES_LIMIT: &str = "1073741824";

/// Settings that could split, delay, reorder or drop an insert, pinned on every attempt if the server knows them.
const PINNED: &[(&str, &str)] = &[
    ("async_insert", "0"),
    ("insert_deduplicate", "1"),
    ("deduplicate_insert", "enable"),
    ("deduplicate_blocks_in_dependent_materialized_views", "1"),
    ("max_insert_threads", "1"),
    ("max_insert_block_size", BLOCK_ROWS_LIMIT),
    ("min_insert_block_size_rows", BLOCK_ROWS_LIMIT),
    ("min_insert_block_size_bytes", BLOCK_BYTES_LIMIT),
    ("input_format_parallel_parsing", "0"),
    ("insert_keeper_max_retries", "20"),
    ("materialized_views_ignore_errors", "0"),
    ("max_execution_time", "0"),
];

/// Where a server is and who asks.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    url: String,
    user: Option<String>,
    password: Option<String>,
    pub database: String,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("url", &self.shown()).field("database", &self.database).finish()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    #[error("endpoint {0} is not a URL such as http://user:password@host:8123/?database=default")]
    NotAUrl(String),
    #[error("endpoint {0} asks for TLS, which this build does not have; use http:// through a TLS proxy")]
    Tls(String),
    #[error("endpoint {0}: a %-escape in the URL is malformed")]
    Escape(String),
}

impl Endpoint {
    /// `http://[user[:password]@]host[:port][/][?database=..&user=..&password=..]`.
    pub fn parse(url: &str) -> Result<Endpoint, EndpointError> {
        let shown = redact_url(url);
        let rest = match url.trim().split_once("://") {
            Some(("http", rest)) => rest,
            Some(("https", _)) => return Err(EndpointError::Tls(shown)),
            _ => return Err(EndpointError::NotAUrl(shown)),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let (userinfo, host) = match authority.rsplit_once('@') {
            Some((userinfo, host)) => (Some(userinfo), host),
            None => (None, authority),
        };
        if host.is_empty() || host.contains(char::is_whitespace) {
            return Err(EndpointError::NotAUrl(shown));
        }
        let has_port = host
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
        let port = if has_port { "" } else { ":8123" };
        let mut endpoint = Endpoint {
            url: format!("http://{host}{port}{}", if path.is_empty() { "/" } else { path }),
            user: None,
            password: None,
            database: "default".to_owned(),
        };
        let unescape = |text: &str| unescape(text).ok_or_else(|| EndpointError::Escape(shown.clone()));
        if let Some(userinfo) = userinfo {
            let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
            endpoint.user = Some(unescape(user)?);
            endpoint.password = Some(unescape(password)?);
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = unescape(value)?;
            match name {
                "database" if !value.is_empty() => endpoint.database = value,
                "user" => endpoint.user = Some(value),
                "password" => endpoint.password = Some(value),
                _ => {}
            }
        }
        Ok(endpoint)
    }

    pub fn with_user(mut self, user: &str, password: &str) -> Endpoint {
        self.user = Some(user.to_owned());
        self.password = Some(password.to_owned());
        self
    }

    /// The database where the URL names none.
    pub fn with_default_database(mut self, database: &str) -> Endpoint {
        if self.database == "default" {
            self.database = database.to_owned();
        }
        self
    }

    /// The URL as it may be shown.
    pub fn shown(&self) -> String {
        redact_url(&self.url)
    }
}

fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            out.push((high * 16 + low) as u8);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CallKind {
    Connect,
    Timeout,
    Network,
    Foreign,
    Exception,
    Request,
    /// The answer is not what was asked for.
    Answer,
}

/// Why a call failed. The message is fit to be shown: no credentials, no record values beyond what the server quotes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    pub kind: CallKind,
    /// ClickHouse's exception code.
    pub code: Option<i32>,
    pub message: String,
}

impl CallError {
    pub fn class(&self) -> Class {
        classify(match self.kind {
            CallKind::Connect => Failure::Connect,
            CallKind::Timeout | CallKind::Network => Failure::NoAnswer,
            CallKind::Foreign | CallKind::Answer => Failure::Foreign,
            CallKind::Request => Failure::Request,
            CallKind::Exception => {
                Failure::Exception { code: self.code.unwrap_or(0), message: &self.message }
            }
        })
    }

    pub fn hint(&self) -> &'static str {
        hint(self.class(), self.code)
    }
}

/// What is asked of a server once per connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerInfo {
    pub version: String,
    /// The server's clock minus its uptime: equal readings (give or take a second) mean the same process.
    pub started_s: i64,
    /// The pinned settings it knows.
    pub known_settings: BTreeSet<String>,
}

/// One insert.
#[derive(Clone, Debug)]
pub struct Insert<'a> {
    /// `INSERT INTO db.table (columns) FORMAT Native`.
    pub sql: &'a str,
    pub block: Bytes,
    pub token: &'a str,
    pub query_id: &'a str,
    pub timeout: Duration,
    pub known_settings: &'a BTreeSet<String>,
}

/// Where the rows of an export are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowPlace {
    pub database: String,
    pub table: String,
    /// The table has a `_topic` column; rows of other topics are not counted.
    pub topic: Option<String>,
}

impl RowPlace {
    pub fn table_sql(&self) -> String {
        format!("{}.{}", quote_ident(&self.database), quote_ident(&self.table))
    }

    fn filter(&self) -> String {
        match &self.topic {
            Some(topic) => format!("`_topic` = {} AND ", quote_string(topic)),
            None => String::new(),
        }
    }
}

#[derive(Clone)]
pub struct ClickHouse {
    client: clickhouse::Client,
    shown: String,
    secrets: Vec<String>,
}

impl fmt::Debug for ClickHouse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClickHouse").field("url", &self.shown).finish()
    }
}

#[derive(Deserialize)]
struct ServerRow {
    version: String,
    started: i64,
}

#[derive(Deserialize)]
struct NameRow {
    name: String,
}

#[derive(Deserialize)]
struct CountRow {
    n: u64,
}

#[derive(Deserialize)]
struct FoundRow {
    i: u64,
    n: u64,
    u: u64,
}

#[derive(Deserialize)]
struct OffsetRow {
    p: i32,
    o: i64,
}

impl ClickHouse {
    pub fn new(endpoint: &Endpoint) -> ClickHouse {
        let mut client = clickhouse::Client::default()
            .with_url(&endpoint.url)
            .with_database(&endpoint.database)
            .with_compression(clickhouse::Compression::None)
            .with_product_info("flumen", env!("CARGO_PKG_VERSION"));
        if let Some(user) = &endpoint.user {
            client = client.with_user(user);
        }
        if let Some(password) = &endpoint.password {
            client = client.with_password(password);
        }
        // A short password could be any word of a message; hiding it there would make the message unreadable.
        let secrets = endpoint.password.iter().filter(|p| p.len() >= 4).cloned().collect();
        ClickHouse { client, shown: endpoint.shown(), secrets }
    }

    /// The URL as it may be shown.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    fn error(&self, error: clickhouse::error::Error) -> CallError {
        use clickhouse::error::Error;
        let (kind, text) = match &error {
            Error::TimedOut => (CallKind::Timeout, format!("{} did not answer in time", self.shown)),
            Error::BadResponse(text) => match exception_code(text) {
                Some(_) => (CallKind::Exception, text.clone()),
                None => (CallKind::Foreign, format!("{} answered: {text}", self.shown)),
            },
            Error::Network(source) => {
                let mut text = source.to_string();
                let mut cause = source.source();
                let mut connect = false;
                while let Some(error) = cause {
                    text.push_str(": ");
                    text.push_str(&error.to_string());
                    if let Some(io) = error.downcast_ref::<std::io::Error>() {
                        connect |= matches!(
                            io.kind(),
                            std::io::ErrorKind::ConnectionRefused
                                | std::io::ErrorKind::HostUnreachable
                                | std::io::ErrorKind::NetworkUnreachable
                                | std::io::ErrorKind::AddrNotAvailable
                        );
                    }
                    cause = error.source();
                }
                // The client says so itself when it never got as far as a connection.
                connect |= source.to_string().contains("(Connect)");
                let kind = if connect { CallKind::Connect } else { CallKind::Network };
                (kind, format!("{}: {text}", self.shown))
            }
            Error::InvalidParams(_) | Error::Unsupported(_) => (CallKind::Request, error.to_string()),
            _ => (CallKind::Network, format!("{}: {error}", self.shown)),
        };
        let code = (kind == CallKind::Exception).then(|| exception_code(&text)).flatten();
        CallError { kind, code, message: self.clean(&text) }
    }

    fn clean(&self, text: &str) -> String {
        let mut text: String = text.trim().chars().take(MAX_ERROR_CHARS).collect();
        for secret in &self.secrets {
            text = text.replace(secret.as_str(), "***");
        }
        text
    }

    async fn timed<T>(
        &self,
        timeout: Duration,
        call: impl Future<Output = Result<T, clickhouse::error::Error>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(timeout, call).await {
            Ok(result) => result.map_err(|e| self.error(e)),
            Err(_) => Err(self.error(clickhouse::error::Error::TimedOut)),
        }
    }

    /// `SELECT 1`, quickly.
    pub async fn probe(&self) -> Result<(), CallError> {
        self.timed(PROBE_TIMEOUT, self.client.query_raw("SELECT 1 FORMAT Null").execute()).await
    }

    /// Runs a statement without a result.
    pub async fn execute(&self, sql: &str) -> Result<(), CallError> {
        self.timed(QUERY_TIMEOUT, self.client.query_raw(sql).execute()).await
    }

    /// Rows of a query, by name.
    pub async fn rows<T: DeserializeOwned>(&self, sql: &str) -> Result<Vec<T>, CallError> {
        let fetch = async {
            // 64-bit integers as numbers: serde reads them exactly.
            let query =
                self.client.query_raw(sql).with_setting("output_format_json_quote_64bit_integers", "0");
            query.fetch_bytes("JSONEachRow")?.collect().await
        };
        let bytes = self.timed(QUERY_TIMEOUT, fetch).await?;
        let answer = |e: &dyn fmt::Display| CallError {
            kind: CallKind::Answer,
            code: None,
            message: self.clean(&format!("{} gave an answer that cannot be read: {e}", self.shown)),
        };
        bytes
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).map_err(|e| answer(&e)))
            .collect()
    }

    async fn row<T: DeserializeOwned>(&self, sql: &str) -> Result<T, CallError> {
        self.rows(sql).await?.into_iter().next().ok_or_else(|| CallError {
            kind: CallKind::Answer,
            code: None,
            message: format!("{} gave an empty answer", self.shown),
        })
    }

    pub async fn server_info(&self) -> Result<ServerInfo, CallError> {
        let server: ServerRow = self.row(SERVER_SQL).await?;
        let names: Vec<String> = PINNED.iter().map(|(name, _)| quote_string(name)).collect();
        let known: Vec<NameRow> = self
            .rows(&format!("SELECT name FROM system.settings WHERE name IN ({})", names.join(", ")))
            .await?;
        Ok(ServerInfo {
            version: server.version,
            started_s: server.started,
            known_settings: known.into_iter().map(|row| row.name).collect(),
        })
    }

    /// The server's clock minus its uptime.
    pub async fn started_s(&self) -> Result<i64, CallError> {
        Ok(self.row::<ServerRow>(SERVER_SQL).await?.started)
    }

    /// One block, one request. Returns after the server's complete answer.
    pub async fn insert(&self, insert: &Insert<'_>, compress: bool) -> Result<(), CallError> {
        let client = if compress {
            self.client.clone().with_compression(clickhouse::Compression::Lz4)
        } else {
            self.client.clone()
        };
        let mut call = client
            .insert_formatted_with(insert.sql)
            .with_setting("query_id", insert.query_id)
            .with_setting("wait_end_of_query", "1")
            .with_setting("insert_deduplication_token", insert.token);
        for (name, value) in PINNED {
            if insert.known_settings.contains(*name) {
                call = call.with_setting(*name, *value);
            }
        }
        let block = insert.block.clone();
        let send = async move {
            call.send(block).await?;
            call.end().await
        };
        // The client's task goes on reading the answer if this future is dropped by the time-out; the server is
        // neither told nor asked to stop.
        self.timed(insert.timeout, send).await
    }

    /// Whether a query runs whose id or token starts with `token`.
    pub async fn is_running(&self, token: &str) -> Result<bool, CallError> {
        let token = quote_string(token);
        let count: CountRow = self
            .row(&format!(
                "SELECT count() AS n FROM system.processes WHERE startsWith(query_id, {token}) \
                 OR startsWith(Settings['insert_deduplication_token'], {token})"
            ))
            .await?;
        Ok(count.n > 0)
    }

    /// Rows and distinct offsets per range, in the order of `ranges`.
    pub async fn read_back(&self, place: &RowPlace, ranges: &[Range]) -> Result<Vec<Found>, CallError> {
        let mut found = vec![Found::default(); ranges.len()];
        for (chunk_at, chunk) in ranges.chunks(RANGES_PER_QUERY).enumerate() {
            let from = chunk_at * RANGES_PER_QUERY;
            let sql = format!(
                "SELECT multiIf({}, 0) AS i, count() AS n, uniqExact(`_offset`) AS u FROM {} WHERE {}({}) \
                 GROUP BY i",
                chunk
                    .iter()
                    .enumerate()
                    .map(|(at, r)| format!("{}, {}", range_sql(r), from + at + 1))
                    .collect::<Vec<_>>()
                    .join(", "),
                place.table_sql(),
                place.filter(),
                ranges_sql(chunk),
            );
            for row in self.rows::<FoundRow>(&sql).await? {
                let at = usize::try_from(row.i).ok().and_then(|i| i.checked_sub(1));
                if let Some(slot) = at.and_then(|at| found.get_mut(at)) {
                    *slot = Found { rows: row.n, offsets: row.u };
                }
            }
        }
        Ok(found)
    }

    /// Every offset of the ranges that is present.
    pub async fn list_present(
        &self,
        place: &RowPlace,
        ranges: &[Range],
    ) -> Result<BTreeSet<(i32, i64)>, CallError> {
        let mut present = BTreeSet::new();
        for chunk in ranges.chunks(RANGES_PER_QUERY) {
            let sql = format!(
                "SELECT toInt32(`_partition`) AS p, toInt64(`_offset`) AS o FROM {} WHERE {}({})",
                place.table_sql(),
                place.filter(),
                ranges_sql(chunk),
            );
            present.extend(self.rows::<OffsetRow>(&sql).await?.into_iter().map(|row| (row.p, row.o)));
        }
        Ok(present)
    }

    /// How many rows the table holds at or above these offsets.
    pub async fn rows_from(&self, place: &RowPlace, from: &[(i32, i64)]) -> Result<u64, CallError> {
        let ranges: Vec<Range> = from
            .iter()
            .map(|(partition, first)| Range { partition: *partition, first: *first, last: i64::MAX, rows: 0 })
            .collect();
        Ok(self.read_back(place, &ranges).await?.iter().map(|found| found.rows).sum())
    }
}

const SERVER_SQL: &str =
    "SELECT version() AS version, toInt64(toUnixTimestamp(now())) - toInt64(uptime()) AS started";

fn range_sql(range: &Range) -> String {
    if range.last == i64::MAX {
        return format!("(`_partition` = {} AND `_offset` >= {})", range.partition, range.first);
    }
    format!(
        "(`_partition` = {} AND `_offset` >= {} AND `_offset` <= {})",
        range.partition, range.first, range.last
    )
}

fn ranges_sql(ranges: &[Range]) -> String {
    ranges.iter().map(range_sql).collect::<Vec<_>>().join(" OR ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let e = Endpoint::parse("http://u%40x:p%3A@ch.example:18123/?database=retail").unwrap();
        assert_eq!(e.url, "http://ch.example:18123/");
        assert_eq!((e.user.as_deref(), e.password.as_deref()), (Some("u@x"), Some("p:")));
        assert_eq!(e.database, "retail");
        assert!(!format!("{e:?}").contains("u@x"));
        assert_eq!(Endpoint::parse("http://ch").unwrap().url, "http://ch:8123/");
        assert_eq!(Endpoint::parse("http://[::1]:9/").unwrap().url, "http://[::1]:9/");
        assert!(
            matches!(Endpoint::parse("https://u:secret@ch"), Err(EndpointError::Tls(u)) if u == "https://ch")
        );
        assert!(matches!(Endpoint::parse("ch:8123"), Err(EndpointError::NotAUrl(_))));
        assert!(matches!(Endpoint::parse("http:///x"), Err(EndpointError::NotAUrl(_))));
        assert!(matches!(Endpoint::parse("http://a%zz@h"), Err(EndpointError::Escape(_))));
    }

    #[test]
    fn secrets_stay_out_of_errors() {
        let client = ClickHouse::new(&Endpoint::parse("http://bob:hunter22@h").unwrap());
        let error = client.error(clickhouse::error::Error::BadResponse(
            "Code: 516. DB::Exception: bob: hunter22 is wrong".into(),
        ));
        assert_eq!(error.code, Some(516));
        assert!(!error.message.contains("hunter22"));
        assert_eq!(error.class(), Class::Operator);
        let foreign = client.error(clickhouse::error::Error::BadResponse("502 Bad Gateway".into()));
        assert_eq!((foreign.kind, foreign.class()), (CallKind::Foreign, Class::Ambiguous));
    }
}
