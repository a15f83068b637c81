//! What goes into the engine and what comes out: statements, answers, errors with ClickHouse's codes.
#![forbid(unsafe_code)]

/// Codes of ClickHouse that are made here and not by the engine.
pub mod code {
    pub const SYNTAX_ERROR: i32 = 62;
    pub const NOT_IMPLEMENTED: i32 = 48;
    pub const CANNOT_OPEN_FILE: i32 = 76;
    pub const UNKNOWN_SETTING: i32 = 115;
    pub const LOGICAL_ERROR: i32 = 49;
    pub const BAD_ARGUMENTS: i32 = 36;
    pub const CANNOT_DECOMPRESS: i32 = 271;
    pub const UNKNOWN_COMPRESSION_METHOD: i32 = 89;
    pub const SAME_QUERY_ID: i32 = 216;
    pub const TOO_MANY_QUERIES: i32 = 202;
    pub const SESSION_NOT_FOUND: i32 = 372;
    pub const SESSION_IS_LOCKED: i32 = 373;
    pub const AUTHENTICATION_FAILED: i32 = 516;
    pub const UNKNOWN_ROLE: i32 = 511;
    pub const LIMIT_EXCEEDED: i32 = 290;
    pub const ABORTED: i32 = 236;
    pub const INCORRECT_DATA: i32 = 117;
}

/// An error of the engine, or one of ours in the engine's words. `message` has no `Code: N.` in front.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Code: {code}. DB::Exception: {message}")]
pub struct EngineError {
    pub code: i32,
    pub message: String,
}

impl EngineError {
    pub fn new(code: i32, message: impl Into<String>) -> EngineError {
        EngineError { code, message: message.into() }
    }

    /// Reads the engine's text. It may carry the prefix several times; the first code is the cause.
    pub(crate) fn parse(text: &str) -> EngineError {
        let mut code = None;
        let mut rest = text.trim();
        while let Some(tail) = rest.strip_prefix("Code: ") {
            let Some((number, tail)) = tail.split_once(". ") else { break };
            let Ok(number) = number.parse::<i32>() else { break };
            code = code.or(Some(number));
            rest = tail.strip_prefix("DB::Exception: ").unwrap_or(tail);
        }
        EngineError::new(code.unwrap_or(code::LOGICAL_ERROR), rest)
    }
}

/// One statement and all that applies to it alone.
#[derive(Debug, Clone, Default)]
pub struct Statement {
    /// SQL; an INSERT may carry its data behind `FORMAT name` or `VALUES`.
    pub sql: Vec<u8>,
    /// More data of an INSERT, behind what `sql` has.
    pub body: Option<bytes::Bytes>,
    /// Format of the result where the statement names none.
    pub format: String,
    pub database: Option<String>,
    /// Settings by name, applied in order.
    pub settings: Vec<(String, String)>,
    /// Values of `{name:Type}`, in ClickHouse's escaped text form.
    pub params: Vec<(String, String)>,
    /// Refuse to change anything: what ClickHouse does for GET.
    pub readonly: bool,
}

/// What a statement gave.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub data: Vec<u8>,
    pub rows_read: u64,
    pub bytes_read: u64,
    pub rows_written: u64,
    pub bytes_written: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_code_of_nested_errors_is_the_cause() {
        let e =
            EngineError::parse("Code: 108. DB::Exception: Code: 27. DB::Exception: No data. (X) (version 1)");
        assert_eq!((e.code, e.message.as_str()), (108, "No data. (X) (version 1)"));
        assert_eq!(e.to_string(), "Code: 108. DB::Exception: No data. (X) (version 1)");
        assert_eq!(EngineError::parse("odd").code, code::LOGICAL_ERROR);
    }
}
