//! JSON records straight into columns, without a value tree.
//!
//! Owns the walk over one record: which field goes to which column, duplicates, what is missing. Pure, any thread.
//! Every field's value is taken as its raw text (`scan` checks it) and decoded exactly by the column (`block/leaf`),
//! so no number passes through a float on its way. Invariants: a record never causes a panic; the stack is bounded
//! by the depth of the column types, since values are skipped iteratively; error messages carry types and limits,
//! never values. It does not undo a half-written row: the block builder does.

pub(crate) mod number;
pub(crate) mod scan;
pub(crate) mod time;

use std::borrow::Cow;
use std::fmt;

use scan::{Scanner, SyntaxError, Value};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::block::leaf::{CellError, Rules};
use crate::block::node::Node;
use crate::mapping::{RowMapping, Source, UnknownFields};

/// Why a record does not fit the table: its reason in the dead-letter headers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct RowError {
    /// One of `code`.
    pub code: &'static str,
    /// The column or field concerned.
    pub column: Option<String>,
    /// Says types and limits, never values of the record.
    pub message: String,
}

/// The codes of `RowError`. They are stored in dead-letter headers: do not rename.
pub mod code {
    /// No value at all: the caller's tombstone rule decides.
    pub const TOMBSTONE: &str = "TOMBSTONE";
    /// Not one JSON object and nothing else.
    pub const NOT_JSON: &str = "NOT_JSON";
    /// Bytes that are not UTF-8, or an escape for half a character.
    pub const BAD_UTF8: &str = "BAD_UTF8";
    pub const MISSING_FIELD: &str = "MISSING_FIELD";
    pub const UNKNOWN_FIELD: &str = "UNKNOWN_FIELD";
    pub const DUPLICATE_FIELD: &str = "DUPLICATE_FIELD";
    pub const NULL_NOT_ALLOWED: &str = "NULL_NOT_ALLOWED";
    pub const WRONG_TYPE: &str = "WRONG_TYPE";
    pub const OUT_OF_RANGE: &str = "OUT_OF_RANGE";
    /// More fraction digits than the column keeps.
    pub const EXCESS_FRACTION: &str = "EXCESS_FRACTION";
    /// Timestamp text without an offset for a column in a named zone.
    pub const NO_TIME_ZONE: &str = "NO_TIME_ZONE";
    pub const ROW_TOO_LARGE: &str = "ROW_TOO_LARGE";
}

/// Names taken from a record into an error are cut here.
const MAX_NAME_CHARS: usize = 128;

impl RowError {
    pub(crate) fn new(code: &'static str, column: Option<&str>, message: impl Into<String>) -> RowError {
        RowError {
            code,
            column: column.map(|name| name.chars().take(MAX_NAME_CHARS).collect()),
            message: message.into(),
        }
    }

    pub(crate) fn of_cell(column: &str, cell: CellError) -> RowError {
        RowError { code: cell.code, column: Some(column.to_owned()), message: cell.message }
    }
}

/// What the walk remembers from record to record: which columns this record has filled, and the field order of
/// the last record, which the next one nearly always repeats.
#[derive(Debug)]
pub(crate) struct FieldOrder {
    /// Per column, the stamp of the record that last filled it.
    seen: Vec<u64>,
    stamp: u64,
    /// Per position in the record, the column found there last time. Only a guess: names are always compared.
    guesses: Vec<u32>,
    /// Positions beyond this are looked up without a guess, so that a record of a million unknown fields
    /// does not grow the table.
    max_guesses: usize,
    /// Per column, its name as it nearly always stands in a record, quotes and colon included; empty where the name
    /// would stand there in another form.
    members: Vec<Vec<u8>>,
    /// What the scanner needs for nested values.
    open: Vec<u8>,
}

impl FieldOrder {
    pub(crate) fn new(mapping: &RowMapping) -> FieldOrder {
        let columns = mapping.columns();
        let guesses: Vec<u32> =
            (0u32..).zip(columns).filter(|(_, c)| c.source == Source::Json).map(|(at, _)| at).collect();
        let member = |name: &str| match name.bytes().any(|c| c < 0x20 || c == b'"' || c == b'\\') {
            true => Vec::new(),
            false => format!("\"{name}\":").into_bytes(),
        };
        FieldOrder {
            seen: vec![0; columns.len()],
            stamp: 0,
            guesses,
            max_guesses: columns.len() * 2 + 16,
            members: columns.iter().map(|column| member(&column.name)).collect(),
            open: Vec::new(),
        }
    }

    pub(crate) fn was_seen(&self, column: usize) -> bool {
        self.seen.get(column) == Some(&self.stamp)
    }
}

/// Decodes one record into the JSON-sourced columns. Returns how many of them it filled.
pub(crate) fn decode_record(
    text: &str,
    mapping: &RowMapping,
    nodes: &mut [Node],
    order: &mut FieldOrder,
    rules: &Rules,
) -> Result<usize, RowError> {
    order.stamp += 1;
    let mut scanner = Scanner::new(text);
    let syntax = |e| not_json(text, e);
    if scanner.peek().is_some_and(|first| first != b'{') {
        let whole = scanner.value(&mut order.open).and_then(|_| scanner.end());
        return Err(match whole {
            Ok(()) => RowError::new(code::NOT_JSON, None, "the record is JSON but not an object"),
            Err(e) => syntax(e),
        });
    }
    scanner.expect(b'{').map_err(syntax)?;
    let (mut filled, mut position) = (0, 0);
    let mut more = scanner.peek() != Some(b'}') || scanner.more_members().map_err(syntax)?;
    while more {
        let column = member(&mut scanner, position, mapping, order, text)?;
        position += 1;
        let value = scanner.value(&mut order.open).map_err(syntax)?;
        if let Some(column) = column {
            let name = || mapping.columns().get(column).map_or("", |c| c.name.as_str());
            if let (Some(node), Some(seen)) = (nodes.get_mut(column), order.seen.get_mut(column)) {
                if *seen == order.stamp {
                    return Err(RowError::new(code::DUPLICATE_FIELD, Some(name()), "the field occurs twice"));
                }
                *seen = order.stamp;
                filled += 1;
                node.push_value(value, rules).map_err(|cell| RowError::of_cell(name(), cell))?;
            }
        }
        more = scanner.more_members().map_err(syntax)?;
    }
    scanner.end().map_err(syntax)?;
    Ok(filled)
}

fn not_json(text: &str, error: SyntaxError) -> RowError {
    let message = match error {
        SyntaxError::End => "the record ends inside a JSON value".to_owned(),
        SyntaxError::At(at) => {
            let before = text.as_bytes().get(..at).unwrap_or_default();
            let line = before.iter().filter(|c| **c == b'\n').count() + 1;
            let column = before.iter().rev().take_while(|c| **c != b'\n').count() + 1;
            format!("the record is not valid JSON at line {line} column {column}")
        }
    };
    RowError::new(code::NOT_JSON, None, message)
}

/// A member's name and colon: the column that takes its value, or none.
fn member(
    scanner: &mut Scanner<'_>,
    position: usize,
    mapping: &RowMapping,
    order: &mut FieldOrder,
    text: &str,
) -> Result<Option<usize>, RowError> {
    let syntax = |e| not_json(text, e);
    let guess = order.guesses.get(position).map(|at| *at as usize);
    scanner.peek();
    if let Some(at) = guess
        && let Some(member) = order.members.get(at).filter(|member| !member.is_empty())
        && scanner.take(member)
    {
        return Ok(Some(at));
    }
    let name = match scanner.string().map_err(syntax)? {
        Value::Str { quoted, escaped } => string_text(quoted, escaped).map_err(|e| {
            RowError::new(code::NOT_JSON, None, format!("in the name of a field, {}", e.message))
        })?,
        Value::Raw(raw) => Cow::Borrowed(raw),
    };
    scanner.expect(b':').map_err(syntax)?;
    if let Some(at) = guess
        && mapping.columns().get(at).is_some_and(|c| c.name == *name)
    {
        return Ok(Some(at));
    }
    let found = mapping.find(&name);
    match found {
        Some(at) => {
            let at32 = at as u32;
            if let Some(guess) = order.guesses.get_mut(position) {
                *guess = at32;
            } else if position < order.max_guesses {
                // Positions in between were unknown fields: any guess will do for them.
                order.guesses.resize(position + 1, at32);
            }
        }
        None if mapping.options().unknown_fields == UnknownFields::DeadLetter => {
            return Err(RowError::new(
                code::UNKNOWN_FIELD,
                Some(&name),
                "no sent column of the table has this name",
            ));
        }
        None => {}
    }
    Ok(found)
}

/// The text of a JSON string, given with its quotes.
pub(crate) fn string_text(quoted: &str, escaped: bool) -> Result<Cow<'_, str>, CellError> {
    if !escaped {
        return Ok(Cow::Borrowed(quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default()));
    }
    // The syntax was checked by the scanner, except that \u escapes may name half a character.
    serde_json::from_str::<String>(quoted)
        .map(Cow::Owned)
        .map_err(|_| CellError::new(code::BAD_UTF8, "a string escapes half a surrogate pair"))
}

/// Walks a JSON array's elements as raw text.
pub(crate) fn for_each_element(
    raw: &str,
    each: &mut dyn FnMut(&str) -> Result<(), CellError>,
) -> Result<(), CellError> {
    struct Elements<'a> {
        each: &'a mut dyn FnMut(&str) -> Result<(), CellError>,
        error: &'a mut Option<CellError>,
    }
    impl<'de> Visitor<'de> for Elements<'_> {
        type Value = ();
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array")
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
            while let Some(raw) = seq.next_element::<&'de RawValue>()? {
                if let Err(cell) = (self.each)(raw.get()) {
                    *self.error = Some(cell);
                    return Err(A::Error::custom("cell"));
                }
            }
            Ok(())
        }
    }
    let mut error = None;
    let mut json = serde_json::Deserializer::from_str(raw);
    let result = json.deserialize_seq(Elements { each, error: &mut error });
    nested_result(error, result)
}

/// Walks a JSON object's entries: key text and raw value.
pub(crate) fn for_each_entry(
    raw: &str,
    each: &mut dyn FnMut(&str, &str) -> Result<(), CellError>,
) -> Result<(), CellError> {
    struct Entries<'a> {
        each: &'a mut dyn FnMut(&str, &str) -> Result<(), CellError>,
        error: &'a mut Option<CellError>,
    }
    impl<'de> Visitor<'de> for Entries<'_> {
        type Value = ();
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            // Keys in order of appearance; sorted afterwards to find a repeated one in n log n.
            let mut keys: Vec<Cow<'de, str>> = Vec::new();
            while let Some(key) = map.next_key_seed(TextSeed)? {
                let raw: &'de RawValue = map.next_value()?;
                if let Err(cell) = (self.each)(&key, raw.get()) {
                    *self.error = Some(cell);
                    return Err(A::Error::custom("cell"));
                }
                keys.push(key);
            }
            keys.sort_unstable();
            if keys.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
                *self.error = Some(CellError::new(code::DUPLICATE_FIELD, "a key occurs twice in the object"));
                return Err(A::Error::custom("duplicate key"));
            }
            Ok(())
        }
    }
    let mut error = None;
    let mut json = serde_json::Deserializer::from_str(raw);
    let result = json.deserialize_map(Entries { each, error: &mut error });
    nested_result(error, result)
}

fn nested_result(error: Option<CellError>, result: Result<(), serde_json::Error>) -> Result<(), CellError> {
    match (error, result) {
        (Some(cell), _) => Err(cell),
        (None, Ok(())) => Ok(()),
        // The text was checked when it was skipped, but for surrogates in a key.
        (None, Err(_)) => Err(CellError::new(code::BAD_UTF8, "a key escapes half a surrogate pair")),
    }
}

struct TextSeed;

impl<'de> DeserializeSeed<'de> for TextSeed {
    type Value = Cow<'de, str>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Cow<'de, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for TextSeed {
    type Value = Cow<'de, str>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Borrowed(text))
    }
    fn visit_str<E>(self, text: &str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}
