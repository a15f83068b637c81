//! What a failure means and what the operator can do about it. Pure.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Goes away by itself: back off and try again.
    Transient,
    /// The insert may have happened: look before anything else.
    Ambiguous,
    /// The server lacks memory: smaller blocks.
    Resource,
    /// The block spans too many partitions: smaller blocks.
    BatchShape,
    /// A row in the block is refused: find it, put it into the dead letters.
    BadRows,
    /// A person must change something. Nothing is skipped, nothing goes to the dead letters.
    Operator,
    /// Not known: a few attempts, then as `Operator`.
    Unknown,
}

impl Class {
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Transient => "transient",
            Class::Ambiguous => "ambiguous",
            Class::Resource => "resource",
            Class::BatchShape => "batch_shape",
            Class::BadRows => "bad_rows",
            Class::Operator => "operator",
            Class::Unknown => "unknown",
        }
    }
}

/// What is known of a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure<'a> {
    /// No connection: nothing was sent.
    Connect,
    /// No complete answer: time-out, reset, cut.
    NoAnswer,
    /// An answer that is not ClickHouse's: a proxy's page, an empty 5xx.
    Foreign,
    /// ClickHouse's exception.
    Exception { code: i32, message: &'a str },
    /// The request could not be made: a bad URL, TLS without support for it.
    Request,
}

pub fn classify(failure: Failure<'_>) -> Class {
    match failure {
        Failure::Connect => Class::Transient,
        Failure::NoAnswer | Failure::Foreign => Class::Ambiguous,
        Failure::Request => Class::Operator,
        Failure::Exception { code, message } => classify_code(code, message),
    }
}

fn classify_code(code: i32, message: &str) -> Class {
    match code {
        // TOO_MANY_PARTS is also the code of a block that spans too many partitions, which no waiting cures.
        252 if message.contains("partitions for single INSERT block") => Class::BatchShape,
        159 | 198 | 202 | 203 | 209 | 210 | 242 | 252 | 254 | 265 | 279 | 285 | 286 | 289 | 290 | 297
        | 364 | 384 | 425 | 999 | 1000 => Class::Transient,
        // 216: an insert of the same id is still running.
        319 | 3 | 216 | 236 | 394 => Class::Ambiguous,
        241 | 243 | 201 => Class::Resource,
        6 | 25 | 26 | 27 | 38 | 41 | 53 | 69 | 72 | 117 | 131 | 321 | 349 | 469 => Class::BadRows,
        // 33 is a block that was cut on the way: the bytes here are whole.
        33 => Class::Ambiguous,
        10 | 16 | 36 | 47 | 60 | 62 | 81 | 115 | 164 | 192..=195 | 291 | 452 | 497 | 516 => Class::Operator,
        _ => Class::Unknown,
    }
}

/// What to do, in one sentence.
pub fn hint(class: Class, code: Option<i32>) -> &'static str {
    match (class, code) {
        (_, Some(516 | 192 | 193 | 194)) => "check user and password of the endpoint, then resume the export",
        (_, Some(497 | 164 | 291)) => {
            "grant the endpoint's user INSERT and SELECT on the table, then resume the export"
        }
        (_, Some(60)) => "create the table or set flumen.clickhouse.auto.create=true, then resume the export",
        (_, Some(81)) => "create the database or set flumen.clickhouse.database, then resume the export",
        (_, Some(10 | 16 | 47)) => {
            "a column of the table was dropped or renamed: restore it, then resume the export"
        }
        (_, Some(115 | 452)) => "the server or the user's profile refuses a setting that exactly-once needs",
        (_, Some(252)) => "the server has too many parts: the export waits for its merges",
        (_, Some(242)) => "the table is read-only (Keeper is away): the export waits",
        (_, Some(243)) => "the server's disk is full: free space; the export waits",
        (Class::Transient, None) => {
            "ClickHouse cannot be reached: check that it runs and that the endpoint is right; the export keeps trying"
        }
        (Class::Transient, _) => "the export keeps trying",
        (Class::Ambiguous, _) => "the outcome is looked up before anything is sent again",
        (Class::Resource, _) => "the server lacks memory: blocks are made smaller",
        (Class::BatchShape, _) => {
            "the table's partition key is too fine for a block: blocks are made smaller"
        }
        (Class::BadRows, _) => "the refused row is looked for and goes to the dead letters",
        (Class::Operator, _) => "correct the cause, then resume the export",
        (Class::Unknown, _) => "the export tries a few times, then waits for you",
    }
}

/// The code in ClickHouse's exception text, `Code: 60. DB::Exception: ...`.
pub fn exception_code(text: &str) -> Option<i32> {
    let rest = text.get(text.find("Code: ")? + 6..)?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exception(code: i32, message: &str) -> Class {
        classify(Failure::Exception { code, message })
    }

    #[test]
    fn codes_sort_into_classes() {
        assert_eq!(exception(252, "Too many parts (3000)"), Class::Transient);
        assert_eq!(
            exception(252, "Too many partitions for single INSERT block (more than 100)"),
            Class::BatchShape
        );
        assert_eq!(exception(319, ""), Class::Ambiguous);
        assert_eq!(exception(241, ""), Class::Resource);
        assert_eq!(exception(469, ""), Class::BadRows);
        for code in [60, 81, 516, 497] {
            assert_eq!(exception(code, ""), Class::Operator);
        }
        assert_eq!(exception(123_456, ""), Class::Unknown);
        assert_eq!(classify(Failure::Connect), Class::Transient);
        assert_eq!(classify(Failure::NoAnswer), Class::Ambiguous);
        assert_eq!(classify(Failure::Foreign), Class::Ambiguous);
    }

    #[test]
    fn code_from_text() {
        assert_eq!(exception_code("Code: 60. DB::Exception: no table"), Some(60));
        assert_eq!(exception_code("x\nCode: 999"), Some(999));
        assert_eq!(exception_code("502 Bad Gateway"), None);
        assert_eq!(exception_code("Code: x"), None);
        assert_eq!(exception_code("Code: 99999999999"), None);
    }
}
