//! Columns guessed from sample records, for a table that does not exist yet; the DDL is shown before it is run.
//!
//! Owns the guess; pure, any thread, off the hot path. Invariants: the same samples in the same order give the
//! same columns; every sample that parsed fits them. It does not see the table or the server.
//!
//! Whole numbers are Int64 (UInt64 or Decimal(20, 0) where they exceed it), others Float64; strings are
//! DateTime64(3) if all read as timestamps (finer if they are), Date32 if all read as dates; objects are
//! Map(String, T); whatever does not agree with itself is String, which takes any JSON value as its text.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::column_type::ColumnType;
use crate::json::time::{parse_date, parse_timestamp};
use crate::table::Column;

/// Fields beyond this say that the records hold data in their keys: a Map is wanted, not columns.
const MAX_INFERRED_COLUMNS: usize = 1000;
/// Deeper nesting is kept as JSON text.
const MAX_INFERRED_DEPTH: usize = 4;
/// Filled from the record's metadata, never from a field.
const METADATA: [&str; 5] = ["_partition", "_offset", "_timestamp", "_key", "_topic"];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InferError {
    #[error("there is no sample record to take columns from")]
    NoSamples,
    #[error("none of {samples} sample records is a JSON object")]
    NoObjects { samples: usize },
    #[error(
        "the sample records hold more than {MAX_INFERRED_COLUMNS} different fields; give the columns instead"
    )]
    TooManyFields,
    #[error("the sample records hold no field that could be a column")]
    NoFields,
}

/// What is known of a field from the samples so far.
#[derive(Clone, Debug, PartialEq)]
enum Shape {
    /// Only nulls, or nothing (the element of an empty array).
    Unknown,
    Bool,
    /// Any is negative; any exceeds Int64.
    Integer {
        negative: bool,
        beyond_i64: bool,
    },
    Float,
    Timestamp {
        precision: u8,
    },
    Date,
    Text,
    Array(Box<Slot>),
    Object(Box<Slot>),
    /// Does not agree with itself.
    Mixed,
}

#[derive(Clone, Debug, PartialEq)]
struct Slot {
    shape: Shape,
    nullable: bool,
}

/// Guesses columns, in the order in which their fields first appear. Samples that are not JSON objects are
/// passed over: in the export they would be dead letters.
pub fn infer_columns<'a>(samples: impl Iterator<Item = &'a [u8]>) -> Result<Vec<Column>, InferError> {
    let mut order: Vec<String> = Vec::new();
    let mut fields: BTreeMap<String, (Slot, usize)> = BTreeMap::new();
    let (mut seen, mut objects) = (0, 0);
    for sample in samples {
        seen += 1;
        let Ok(Value::Object(record)) = serde_json::from_slice::<Value>(sample) else { continue };
        objects += 1;
        for (name, value) in &record {
            if name.is_empty() || METADATA.contains(&name.as_str()) {
                continue;
            }
            let slot = slot_of(value, 0);
            match fields.get_mut(name) {
                Some((known, count)) => {
                    known.join(slot);
                    *count += 1;
                }
                None if order.len() == MAX_INFERRED_COLUMNS => return Err(InferError::TooManyFields),
                None => {
                    order.push(name.clone());
                    fields.insert(name.clone(), (slot, 1));
                }
            }
        }
    }
    match (seen, objects, order.len()) {
        (0, _, _) => return Err(InferError::NoSamples),
        (samples, 0, _) => return Err(InferError::NoObjects { samples }),
        (_, _, 0) => return Err(InferError::NoFields),
        _ => {}
    }
    let column = |name: String| {
        let (slot, count) = fields.get(&name)?;
        let sometimes_missing = *count < objects;
        Some(Column::new(name, slot.column_type(sometimes_missing)))
    };
    Ok(order.into_iter().filter_map(column).collect())
}

fn slot_of(value: &Value, depth: usize) -> Slot {
    let shape = match value {
        Value::Null => return Slot { shape: Shape::Unknown, nullable: true },
        Value::Bool(_) => Shape::Bool,
        Value::Number(number) => {
            if let Some(value) = number.as_i64() {
                Shape::Integer { negative: value < 0, beyond_i64: false }
            } else if number.is_u64() {
                Shape::Integer { negative: false, beyond_i64: true }
            } else {
                Shape::Float
            }
        }
        Value::String(text) => text_shape(text),
        Value::Array(_) | Value::Object(_) if depth >= MAX_INFERRED_DEPTH => Shape::Mixed,
        Value::Array(elements) => Shape::Array(Box::new(join_all(elements.iter(), depth))),
        Value::Object(entries) => Shape::Object(Box::new(join_all(entries.values(), depth))),
    };
    Slot { shape, nullable: false }
}

fn join_all<'a>(values: impl Iterator<Item = &'a Value>, depth: usize) -> Slot {
    let mut all = Slot { shape: Shape::Unknown, nullable: false };
    for value in values {
        all.join(slot_of(value, depth + 1));
    }
    all
}

fn text_shape(text: &str) -> Shape {
    // Outside these years the column types themselves end.
    let in_range = text.get(..4).is_some_and(|year| ("1900".."2262").contains(&year));
    if !in_range {
        return Shape::Text;
    }
    if parse_date(text).is_some() {
        return Shape::Date;
    }
    match parse_timestamp(text) {
        // An offset may carry the first day of 1900 out of range.
        Some(time) if time.seconds >= -2_208_988_800 => {
            let precision = match time.fraction_digits {
                0..=3 => 3,
                4..=6 => 6,
                _ => 9,
            };
            Shape::Timestamp { precision }
        }
        _ => Shape::Text,
    }
}

impl Shape {
    fn is_text(&self) -> bool {
        matches!(self, Shape::Timestamp { .. } | Shape::Date | Shape::Text)
    }
}

impl Slot {
    fn join(&mut self, other: Slot) {
        self.nullable |= other.nullable;
        let mine = std::mem::replace(&mut self.shape, Shape::Unknown);
        self.shape = match (mine, other.shape) {
            (Shape::Unknown, shape) | (shape, Shape::Unknown) => shape,
            (
                Shape::Integer { negative: n1, beyond_i64: b1 },
                Shape::Integer { negative: n2, beyond_i64: b2 },
            ) => Shape::Integer { negative: n1 || n2, beyond_i64: b1 || b2 },
            (Shape::Integer { .. } | Shape::Float, Shape::Integer { .. } | Shape::Float) => Shape::Float,
            (Shape::Timestamp { precision: a }, Shape::Timestamp { precision: b }) => {
                Shape::Timestamp { precision: a.max(b) }
            }
            (Shape::Array(mut a), Shape::Array(b)) => {
                a.join(*b);
                Shape::Array(a)
            }
            (Shape::Object(mut a), Shape::Object(b)) => {
                a.join(*b);
                Shape::Object(a)
            }
            (a, b) if a == b => a,
            (a, b) if a.is_text() && b.is_text() => Shape::Text,
            _ => Shape::Mixed,
        };
    }

    /// `missing`: some records lack the field.
    fn column_type(&self, missing: bool) -> ColumnType {
        let plain = match &self.shape {
            Shape::Bool => ColumnType::Bool,
            Shape::Integer { beyond_i64: false, .. } => ColumnType::Int64,
            Shape::Integer { negative: false, .. } => ColumnType::UInt64,
            Shape::Integer { .. } => ColumnType::Decimal { precision: 20, scale: 0 },
            Shape::Float => ColumnType::Float64,
            Shape::Timestamp { precision } => ColumnType::DateTime64 { precision: *precision, tz: None },
            Shape::Date => ColumnType::Date32,
            Shape::Unknown | Shape::Text | Shape::Mixed => ColumnType::String,
            // Missing and null are empty here.
            Shape::Array(element) => return ColumnType::Array(Box::new(element.column_type(false))),
            Shape::Object(value) => {
                let value = value.column_type(false);
                return ColumnType::Map(Box::new(ColumnType::String), Box::new(value));
            }
        };
        if self.nullable || missing { ColumnType::Nullable(Box::new(plain)) } else { plain }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn infer(samples: &[&str]) -> String {
        match infer_columns(samples.iter().map(|s| s.as_bytes())) {
            Ok(columns) => {
                columns.iter().map(|c| format!("{} {}", c.name, c.ty)).collect::<Vec<_>>().join(", ")
            }
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn every_shape() {
        assert_eq!(
            infer(&[r#"{"z":1,"f":1.5,"b":true,"s":"x","t":"2024-05-01T10:00:00Z","d":"2024-05-01",
                    "a":[1,2],"o":{"k":"v"}}"#]),
            "z Int64, f Float64, b Bool, s String, t DateTime64(3), d Date32, a Array(Int64), \
             o Map(String, String)"
        );
    }

    #[test]
    fn samples_agree_or_become_text() {
        assert_eq!(infer(&[r#"{"a":1}"#, r#"{"a":1.5}"#]), "a Float64");
        assert_eq!(infer(&[r#"{"a":1}"#, r#"{"a":"x"}"#]), "a String");
        assert_eq!(infer(&[r#"{"a":18446744073709551615}"#]), "a UInt64");
        assert_eq!(infer(&[r#"{"a":18446744073709551615}"#, r#"{"a":-1}"#]), "a Decimal(20, 0)");
        assert_eq!(infer(&[r#"{"a":"2024-05-01"}"#, r#"{"a":"soon"}"#]), "a String");
        assert_eq!(
            infer(&[r#"{"a":"2024-05-01 00:00:00"}"#, r#"{"a":"2024-05-01 00:00:00.123456"}"#]),
            "a DateTime64(6)"
        );
        assert_eq!(infer(&[r#"{"a":"0001-01-01T00:00:00Z"}"#]), "a String");
        assert_eq!(infer(&[r#"{"a":{"x":1,"y":"z"}}"#]), "a Map(String, String)");
        assert_eq!(infer(&[r#"{"a":{"x":1}}"#, r#"{"a":{"y":2.5}}"#]), "a Map(String, Float64)");
        assert_eq!(infer(&[r#"{"a":[]}"#, r#"{"a":[null,true]}"#]), "a Array(Nullable(Bool))");
        assert_eq!(infer(&[r#"{"a":[1]}"#, r#"{"a":1}"#]), "a String");
    }

    #[test]
    fn missing_and_null_are_nullable() {
        assert_eq!(infer(&[r#"{"a":1,"b":2}"#, r#"{"b":null}"#]), "a Nullable(Int64), b Nullable(Int64)");
        assert_eq!(infer(&[r#"{"a":null}"#]), "a Nullable(String)");
        assert_eq!(infer(&[r#"{"a":[1]}"#, r#"{}"#, r#"{"a":null}"#]), "a Array(Int64)");
    }

    #[test]
    fn what_cannot_be_used() {
        let infer = |samples: &[&str]| infer_columns(samples.iter().map(|s| s.as_bytes()));
        assert_eq!(infer(&[]), Err(InferError::NoSamples));
        assert_eq!(infer(&["[]", "x"]), Err(InferError::NoObjects { samples: 2 }));
        assert_eq!(infer(&[r#"{"_offset":1}"#]), Err(InferError::NoFields));
        let deep = format!("{}1{}", r#"{"a":"#.repeat(20_000), "}".repeat(20_000));
        assert_eq!(infer(&[&deep]), Err(InferError::NoObjects { samples: 1 }));
        let wide: Vec<String> = (0..1001).map(|n| format!("\"f{n}\":1")).collect();
        assert_eq!(infer(&[&format!("{{{}}}", wide.join(","))]), Err(InferError::TooManyFields));
    }
}
