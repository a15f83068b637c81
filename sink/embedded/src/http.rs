//! ClickHouse's HTTP interface as data: what a request asks, and which status an error gets.
//!
//! Pure. Owns the list of URL parameters that belong to the interface; every other parameter is a setting and goes to
//! the engine, which knows whether it exists. Does not run anything.
#![forbid(unsafe_code)]

use crate::statement::{EngineError, code};

/// Parameters of the interface that change nothing here: results are always complete before they are sent, so waiting
/// and buffering are given; progress headers are not sent.
const IGNORED: &[&str] = &[
    "quota_key",
    "stacktrace",
    "wait_end_of_query",
    "buffer_size",
    "http_headers_progress_interval_ms",
    "send_progress_in_http_headers",
    "client_protocol_version",
    "enable_http_compression",
    "http_zlib_compression_level",
    "framing",
];

/// What the URL and the headers of a request ask.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    pub query: Vec<u8>,
    pub database: Option<String>,
    pub format: Option<String>,
    pub query_id: Option<String>,
    pub session_id: Option<String>,
    pub session_check: bool,
    pub session_timeout_s: Option<u64>,
    pub close_session: bool,
    pub compress: bool,
    pub decompress: bool,
    pub settings: Vec<(String, String)>,
    pub params: Vec<(String, String)>,
    pub user: Option<String>,
    pub password: Option<String>,
}

/// The headers that count.
#[derive(Debug, Clone, Copy, Default)]
pub struct Headers<'a> {
    pub authorization: Option<&'a str>,
    pub user: Option<&'a str>,
    pub key: Option<&'a str>,
    pub database: Option<&'a str>,
    pub format: Option<&'a str>,
}

/// Reads the query part of the URL and the headers.
pub fn parse(url_query: &str, headers: Headers<'_>) -> Result<Ask, EngineError> {
    let bad = |what: String| EngineError::new(code::BAD_ARGUMENTS, what);
    let mut ask = Ask {
        database: headers.database.filter(|d| !d.is_empty()).map(str::to_owned),
        format: headers.format.filter(|f| !f.is_empty()).map(str::to_owned),
        user: headers.user.map(str::to_owned),
        password: headers.key.map(str::to_owned),
        ..Ask::default()
    };
    if let Some(authorization) = headers.authorization {
        let (user, password) = basic(authorization)?;
        ask.user = Some(user);
        ask.password = Some(password);
    }
    for pair in url_query.split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let name = String::from_utf8(unescape(name))
            .map_err(|_| bad("the name of a URL parameter is not UTF-8. (BAD_ARGUMENTS)".into()))?;
        let raw = unescape(value);
        if name == "query" {
            ask.query = raw;
            continue;
        }
        let value = String::from_utf8(raw)
            .map_err(|_| bad(format!("the value of URL parameter `{name}` is not UTF-8. (BAD_ARGUMENTS)")))?;
        let flag = || matches!(value.as_str(), "1" | "true");
        match name.as_str() {
            "database" => ask.database = Some(value).filter(|v| !v.is_empty()).or(ask.database),
            "default_format" => ask.format = Some(value).filter(|v| !v.is_empty()).or(ask.format),
            "query_id" => ask.query_id = Some(value).filter(|v| !v.is_empty()),
            "session_id" => ask.session_id = Some(value).filter(|v| !v.is_empty()),
            "session_check" => ask.session_check = flag(),
            "close_session" => ask.close_session = flag(),
            "session_timeout" => {
                let seconds =
                    value.parse().map_err(|_| bad(format!("Invalid session timeout: '{value}'")))?;
                ask.session_timeout_s = Some(seconds);
            }
            "compress" => ask.compress = flag(),
            "decompress" => ask.decompress = flag(),
            "user" => ask.user = Some(value),
            "password" => ask.password = Some(value),
            "role" => {
                return Err(EngineError::new(
                    code::UNKNOWN_ROLE,
                    format!("There is no role `{value}`: the embedded engine has no roles. (UNKNOWN_ROLE)"),
                ));
            }
            _ if IGNORED.contains(&name.as_str()) => {}
            _ => match name.strip_prefix("param_") {
                Some(param) => put(&mut ask.params, param, value),
                None => put(&mut ask.settings, &name, value),
            },
        }
    }
    Ok(ask)
}

/// The last value of a name counts.
fn put(list: &mut Vec<(String, String)>, name: &str, value: String) {
    match list.iter_mut().find(|(n, _)| n == name) {
        Some(entry) => entry.1 = value,
        None => list.push((name.to_owned(), value)),
    }
}

/// Only the user `default` without a password exists.
pub fn authenticate(ask: &Ask) -> Result<(), EngineError> {
    let user = ask.user.as_deref().filter(|u| !u.is_empty()).unwrap_or("default");
    if user == "default" && ask.password.as_deref().unwrap_or("").is_empty() {
        return Ok(());
    }
    let user: String = user.chars().take(60).collect();
    Err(EngineError::new(
        code::AUTHENTICATION_FAILED,
        format!(
            "{user}: Authentication failed: password is incorrect, or there is no user with such name. The embedded \
             engine has only the user `default` with an empty password. (AUTHENTICATION_FAILED)"
        ),
    ))
}

fn basic(authorization: &str) -> Result<(String, String), EngineError> {
    let refused = || {
        EngineError::new(
            code::AUTHENTICATION_FAILED,
            "Authentication failed: the embedded engine takes HTTP Basic authorization only, of the user `default` \
             with an empty password. (AUTHENTICATION_FAILED)",
        )
    };
    let (scheme, token) = authorization.split_once(' ').ok_or_else(refused)?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(refused());
    }
    let text = base64(token.trim()).and_then(|b| String::from_utf8(b).ok()).ok_or_else(refused)?;
    let (user, password) = text.split_once(':').ok_or_else(refused)?;
    Ok((user.to_owned(), password.to_owned()))
}

fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut bits, mut count) = (0u32, 0u32);
    for b in text.bytes().filter(|b| *b != b'=') {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

/// Percent-decoding of form values; a lone `%` stays as it is.
fn unescape(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(b) = bytes.get(at) {
        let hex = |offset: usize| bytes.get(at + offset).and_then(|b| char::from(*b).to_digit(16));
        match (b, hex(1), hex(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            (b'+', ..) => {
                out.push(b' ');
                at += 1;
            }
            _ => {
                out.push(*b);
                at += 1;
            }
        }
    }
    out
}

/// The HTTP status that ClickHouse gives an error code.
pub fn status(code: i32) -> u16 {
    match code {
        194 => 401,
        192 | 193 | 497 | 512 | 516 => 403,
        6 | 15 | 25 | 26 | 27 | 33 | 36 | 38 | 41 | 43 | 44 | 49 | 53 | 62 | 72 | 89 | 108 | 117 | 130
        | 131 | 167 | 168 | 223 | 271 | 321 | 376 | 427 | 441 | 457 | 675 | 676 => 400,
        46 | 47 | 50 | 56 | 60 | 63 | 73 | 81 | 110 | 115 | 336 | 372 | 511 => 404,
        48 => 501,
        159 => 408,
        164 | 290 => {
            if code == 164 {
                500
            } else {
                413
            }
        }
        202 | 209 | 439 => 503,
        _ => 500,
    }
}

/// `Content-Type` of a format.
pub fn content_type(format: &str) -> &'static str {
    match format {
        "JSON" | "JSONCompact" | "JSONStrings" | "JSONColumns" | "JSONColumnsWithMetadata" => {
            "application/json; charset=UTF-8"
        }
        "JSONEachRow" | "JSONStringsEachRow" | "JSONCompactEachRow" => "application/x-ndjson; charset=UTF-8",
        "CSV" | "CSVWithNames" | "CSVWithNamesAndTypes" => "text/csv; charset=UTF-8; header=absent",
        "TSV"
        | "TabSeparated"
        | "TSVRaw"
        | "TabSeparatedRaw"
        | "TSVWithNames"
        | "TabSeparatedWithNames"
        | "TSVWithNamesAndTypes"
        | "TabSeparatedWithNamesAndTypes" => "text/tab-separated-values; charset=UTF-8",
        "Native"
        | "RowBinary"
        | "RowBinaryWithNames"
        | "RowBinaryWithNamesAndTypes"
        | "Arrow"
        | "ArrowStream"
        | "Parquet"
        | "ORC"
        | "Avro"
        | "MsgPack" => "application/octet-stream",
        "XML" => "application/xml; charset=UTF-8",
        _ => "text/plain; charset=UTF-8",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_sorted_out() {
        let ask = parse(
            "query=SELECT+%7Bx%3AInt8%7D&param_x=5&max_threads=1&database=d&query_id=q&compress=1&max_threads=2&wait_end_of_query=1",
            Headers { format: Some("JSON"), ..Headers::default() },
        )
        .expect("parses");
        assert_eq!(ask.query, b"SELECT {x:Int8}");
        assert_eq!(ask.params, [("x".to_owned(), "5".to_owned())]);
        assert_eq!(ask.settings, [("max_threads".to_owned(), "2".to_owned())]);
        assert_eq!((ask.database.as_deref(), ask.format.as_deref()), (Some("d"), Some("JSON")));
        assert!(ask.compress && !ask.decompress);
    }

    #[test]
    fn only_the_default_user_exists() {
        let ok = |h: Headers<'_>, q: &str| parse(q, h).and_then(|a| authenticate(&a)).is_ok();
        assert!(ok(Headers::default(), ""));
        assert!(ok(Headers { authorization: Some("Basic ZGVmYXVsdDo="), ..Headers::default() }, ""));
        assert!(!ok(Headers { authorization: Some("Basic ZGVmYXVsdDp4"), ..Headers::default() }, ""));
        assert!(!ok(Headers { authorization: Some("Bearer x"), ..Headers::default() }, ""));
        assert!(!ok(Headers::default(), "user=alice"));
        assert!(!ok(Headers { key: Some("x"), ..Headers::default() }, ""));
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape("a%20b+c%zz%4"), b"a b c%zz%4");
        assert_eq!(base64("aGVsbG8="), Some(b"hello".to_vec()));
        assert!(parse("query_id=%ff", Headers::default()).is_err());
        assert!(parse("role=x", Headers::default()).is_err());
    }
}
