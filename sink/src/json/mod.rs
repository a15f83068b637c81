//! JSON records straight into columns, without a value tree.
//!
//! Owns the walk over one record: which field goes to which column, duplicates, what is missing, syntax. Pure,
//! any thread. Every field's value is taken as its raw text (serde_json checks it) and decoded exactly by the
//! column (`block/leaf`), so no number passes through a float on its way. Invariants: a record never causes a
//! panic; the stack is bounded by the depth of the column types, since serde_json skips values iteratively;
//! error messages carry types and limits, never values. It does not undo a half-written row: the block
//! builder does.

pub(crate) mod number;
pub(crate) mod time;

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
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
}

impl FieldOrder {
    pub(crate) fn new(mapping: &RowMapping) -> FieldOrder {
        let columns = mapping.columns();
        let guesses: Vec<u32> =
            (0u32..).zip(columns).filter(|(_, c)| c.source == Source::Json).map(|(at, _)| at).collect();
        FieldOrder { seen: vec![0; columns.len()], stamp: 0, guesses, max_guesses: columns.len() * 2 + 16 }
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
    let mut error = None;
    let mut filled = 0;
    let mut json = serde_json::Deserializer::from_str(text);
    let walk = RecordVisitor { mapping, nodes, order, rules, error: &mut error, filled: &mut filled };
    let result = json.deserialize_map(walk).and_then(|()| json.end());
    match (error, result) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(filled),
        (None, Err(e)) => Err(not_json(&e)),
    }
}

fn not_json(error: &serde_json::Error) -> RowError {
    // Data errors quote the value; the only one that can come up here is a top level of another type.
    let message = match error.classify() {
        serde_json::error::Category::Data => "the record is JSON but not an object".to_owned(),
        serde_json::error::Category::Eof => "the record ends inside a JSON value".to_owned(),
        _ => format!("the record is not valid JSON at line {} column {}", error.line(), error.column()),
    };
    RowError::new(code::NOT_JSON, None, message)
}

struct RecordVisitor<'a> {
    mapping: &'a RowMapping,
    nodes: &'a mut [Node],
    order: &'a mut FieldOrder,
    rules: &'a Rules,
    error: &'a mut Option<RowError>,
    filled: &'a mut usize,
}

impl<'de> Visitor<'de> for RecordVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut position = 0;
        loop {
            let key = KeySeed { mapping: self.mapping, order: self.order, position, error: self.error };
            let Some(column) = map.next_key_seed(key)? else { return Ok(()) };
            position += 1;
            let Some(column) = column else {
                if self.error.is_some() {
                    return Err(A::Error::custom("unknown field"));
                }
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let raw: &'de RawValue = map.next_value()?;
            let name = || self.mapping.columns().get(column).map_or("", |c| c.name.as_str());
            let (Some(node), Some(seen)) = (self.nodes.get_mut(column), self.order.seen.get_mut(column))
            else {
                return Err(A::Error::custom("no such column"));
            };
            if *seen == self.order.stamp {
                *self.error =
                    Some(RowError::new(code::DUPLICATE_FIELD, Some(name()), "the field occurs twice"));
                return Err(A::Error::custom("duplicate field"));
            }
            *seen = self.order.stamp;
            *self.filled += 1;
            if let Err(cell) = node.push_json(raw.get(), self.rules) {
                *self.error = Some(RowError::of_cell(name(), cell));
                return Err(A::Error::custom("cell"));
            }
        }
    }
}

struct KeySeed<'a> {
    mapping: &'a RowMapping,
    order: &'a mut FieldOrder,
    position: usize,
    error: &'a mut Option<RowError>,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Option<usize>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<usize>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Option<usize>, E> {
        let guess = self.order.guesses.get(self.position).map(|at| *at as usize);
        if let Some(at) = guess
            && self.mapping.columns().get(at).is_some_and(|c| c.name == name)
        {
            return Ok(Some(at));
        }
        let found = self.mapping.find(name);
        match found {
            Some(at) => {
                let at32 = at as u32;
                if let Some(guess) = self.order.guesses.get_mut(self.position) {
                    *guess = at32;
                } else if self.position < self.order.max_guesses {
                    // Positions in between were unknown fields: any guess will do for them.
                    self.order.guesses.resize(self.position + 1, at32);
                }
            }
            None if self.mapping.options().unknown_fields == UnknownFields::DeadLetter => {
                *self.error = Some(RowError::new(
                    code::UNKNOWN_FIELD,
                    Some(name),
                    "no sent column of the table has this name",
                ));
            }
            None => {}
        }
        Ok(found)
    }
}

/// The text of a JSON string from its raw form, quotes included.
pub(crate) fn string_text(raw: &str) -> Result<Cow<'_, str>, CellError> {
    let inner = raw.get(1..raw.len().saturating_sub(1)).unwrap_or_default();
    if !inner.as_bytes().contains(&b'\\') {
        return Ok(Cow::Borrowed(inner));
    }
    // The syntax was checked when the value was skipped, except that \u escapes may name half a character.
    serde_json::from_str::<String>(raw)
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
