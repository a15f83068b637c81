//! One column's bytes in a Native block, nested as its type is.
//!
//! Owns Nullable, Array and Map, and the undoing of half-written rows. Pure, any thread. Invariants: between rows
//! all nodes of a column hold the same number of rows; `rollback` returns to the last `commit`, whatever part of
//! a row was written. It does not know field names, nor how a scalar is read (`leaf`).
//!
//! Layout: a node writes its own data, then its children's. Nullable is one byte per row (1 = NULL), then values;
//! Array and Map are cumulative u64 ends, then elements (keys, then values).

use super::leaf::{CellError, Leaf, Rules, int_out_of_range, put_int, put_text, put_ticks, wrong_type};
use crate::column_type::ColumnType;
use crate::json::scan::Value;
use crate::json::{code, for_each_element, for_each_entry};

/// Elements of one array column in one row: guards against `FixedString(65536)` arrays of empty strings, where
/// a small record would become gigabytes.
pub(super) const MAX_ROW_BYTES: usize = 64 << 20;
/// Kept per column between blocks, whatever the last one held: less would only be allocated again.
const MIN_CAPACITY: usize = 4096;

#[derive(Debug)]
enum Kind {
    Leaf(Leaf),
    Nullable(Box<Node>),
    Array { total: u64, elements: Box<Node> },
    Map { total: u64, keys: Box<Node>, values: Box<Node> },
}

/// A column, or a part of one.
#[derive(Debug)]
pub(crate) struct Node {
    kind: Kind,
    /// Leaf: values. Nullable: the null map. Array and Map: the ends.
    data: Vec<u8>,
    /// Length of `data` after the last whole row.
    committed: usize,
    /// For messages only.
    ty: ColumnType,
}

impl Node {
    /// `ty` as it is sent: without LowCardinality (`ColumnType::wire`).
    pub(crate) fn new(ty: &ColumnType) -> Node {
        let child = |ty: &ColumnType| Box::new(Node::new(ty));
        let kind = match ty {
            ColumnType::LowCardinality(inner) => return Node::new(inner),
            ColumnType::Nullable(inner) => Kind::Nullable(child(inner)),
            ColumnType::Array(inner) => Kind::Array { total: 0, elements: child(inner) },
            ColumnType::Map(key, value) => Kind::Map { total: 0, keys: child(key), values: child(value) },
            scalar => Kind::Leaf(Leaf::new(scalar)),
        };
        Node { kind, data: Vec::new(), committed: 0, ty: ty.clone() }
    }

    /// Decodes one JSON value.
    pub(crate) fn push_value(&mut self, value: Value<'_>, rules: &Rules) -> Result<(), CellError> {
        let first = value.first_byte();
        match &mut self.kind {
            Kind::Leaf(leaf) => leaf.push_value(&mut self.data, &self.ty, value, rules),
            Kind::Nullable(inner) => {
                self.data.push(u8::from(first == b'n'));
                if first == b'n' {
                    inner.push_placeholder();
                    Ok(())
                } else {
                    inner.push_value(value, rules)
                }
            }
            Kind::Array { total, elements } => {
                match value {
                    // Go and others write an empty list as null.
                    Value::Raw(_) if first == b'n' => {}
                    Value::Raw(raw) if first == b'[' => for_each_element(raw, &mut |raw| {
                        *total += 1;
                        elements.push_value(Value::of_raw(raw), rules)?;
                        elements.check_row_size()
                    })?,
                    _ => return Err(wrong_type(&self.ty, first)),
                }
                self.data.extend_from_slice(&total.to_le_bytes());
                Ok(())
            }
            Kind::Map { total, keys, values } => {
                match value {
                    Value::Raw(_) if first == b'n' => {}
                    Value::Raw(raw) if first == b'{' => for_each_entry(raw, &mut |key, raw| {
                        *total += 1;
                        keys.push_text(key, rules)?;
                        values.push_value(Value::of_raw(raw), rules)?;
                        keys.check_row_size()?;
                        values.check_row_size()
                    })?,
                    _ => return Err(wrong_type(&self.ty, first)),
                }
                self.data.extend_from_slice(&total.to_le_bytes());
                Ok(())
            }
        }
    }

    /// Decodes text, as from a JSON string.
    fn push_text(&mut self, text: &str, rules: &Rules) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Leaf(leaf) => leaf.push_text(&mut self.data, &self.ty, text, rules),
            _ => Err(wrong_type(&self.ty, b'"')),
        }
    }

    /// The value of a field that the record lacks: NULL or empty, or false where there is none.
    pub(crate) fn push_missing(&mut self) -> bool {
        match &mut self.kind {
            Kind::Leaf(_) => return false,
            Kind::Nullable(inner) => {
                self.data.push(1);
                inner.push_placeholder();
            }
            Kind::Array { total, .. } | Kind::Map { total, .. } => {
                self.data.extend_from_slice(&total.to_le_bytes());
            }
        }
        true
    }

    /// The value that stands under a NULL; the server ignores it, but an enum's must be a declared one.
    fn push_placeholder(&mut self) {
        if let Kind::Leaf(leaf) = &self.kind {
            leaf.push_placeholder(&mut self.data);
        }
    }

    /// A metadata integer.
    pub(crate) fn push_int(&mut self, value: i64) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Nullable(inner) => {
                self.data.push(0);
                inner.push_int(value)
            }
            Kind::Leaf(Leaf::Int { width, min, max, .. }) => {
                let value = i128::from(value);
                if value < *min || value > *max {
                    return Err(int_out_of_range(&self.ty, *min, *max));
                }
                put_int(&mut self.data, *width, value);
                Ok(())
            }
            _ => Err(CellError::new(code::WRONG_TYPE, format!("metadata does not fit {}", self.ty))),
        }
    }

    /// A record key or topic name; the bytes need not be UTF-8. No key is NULL where there is one, else empty.
    pub(crate) fn push_bytes(&mut self, bytes: Option<&[u8]>) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Nullable(inner) => {
                self.data.push(u8::from(bytes.is_none()));
                inner.push_bytes(bytes)
            }
            Kind::Leaf(Leaf::Text) => {
                put_text(&mut self.data, bytes.unwrap_or_default());
                Ok(())
            }
            _ => Err(CellError::new(code::WRONG_TYPE, format!("metadata does not fit {}", self.ty))),
        }
    }

    /// A record timestamp, cut to the column's precision. -1, Kafka's "no timestamp", is NULL where there is
    /// one, else 1970-01-01.
    pub(crate) fn push_timestamp_ms(&mut self, timestamp_ms: i64) -> Result<(), CellError> {
        match &mut self.kind {
            Kind::Nullable(inner) => {
                self.data.push(u8::from(timestamp_ms == -1));
                inner.push_timestamp_ms(timestamp_ms)
            }
            Kind::Leaf(leaf @ (Leaf::DateTime { .. } | Leaf::DateTime64 { .. })) => {
                let ms = i128::from(if timestamp_ms == -1 { 0 } else { timestamp_ms });
                let precision = match leaf {
                    Leaf::DateTime64 { precision, .. } => *precision,
                    _ => 0,
                };
                let ticks = if precision >= 3 {
                    ms * 10i128.pow(u32::from(precision) - 3)
                } else {
                    ms.div_euclid(10i128.pow(3 - u32::from(precision)))
                };
                put_ticks(leaf, &mut self.data, &self.ty, ticks)
            }
            _ => Err(CellError::new(code::WRONG_TYPE, format!("metadata does not fit {}", self.ty))),
        }
    }

    fn check_row_size(&self) -> Result<(), CellError> {
        if self.data.len() - self.committed > MAX_ROW_BYTES {
            return Err(CellError::new(code::ROW_TOO_LARGE, "the elements of one row exceed 64 MiB"));
        }
        Ok(())
    }

    /// The row is whole. Returns the bytes of the column so far.
    pub(crate) fn commit(&mut self) -> usize {
        self.committed = self.data.len();
        self.data.len()
            + match &mut self.kind {
                Kind::Leaf(_) => 0,
                Kind::Nullable(inner) | Kind::Array { elements: inner, .. } => inner.commit(),
                Kind::Map { keys, values, .. } => keys.commit() + values.commit(),
            }
    }

    pub(crate) fn rollback(&mut self) {
        self.data.truncate(self.committed);
        let end = self.data.last_chunk::<8>().map_or(0, |end| u64::from_le_bytes(*end));
        match &mut self.kind {
            Kind::Leaf(_) => {}
            Kind::Nullable(inner) => inner.rollback(),
            Kind::Array { total, elements } => {
                *total = end;
                elements.rollback();
            }
            Kind::Map { total, keys, values } => {
                *total = end;
                keys.rollback();
                values.rollback();
            }
        }
    }

    pub(crate) fn clear(&mut self) {
        // The next block is likely as large as this one; what a surge needed is given back after it.
        let keep = (self.data.len() * 2).max(MIN_CAPACITY);
        self.data.clear();
        self.data.shrink_to(keep);
        self.committed = 0;
        match &mut self.kind {
            Kind::Leaf(_) => {}
            Kind::Nullable(inner) => inner.clear(),
            Kind::Array { total, elements } => {
                *total = 0;
                elements.clear();
            }
            Kind::Map { total, keys, values } => {
                *total = 0;
                keys.clear();
                values.clear();
            }
        }
    }

    pub(crate) fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.data);
        match &self.kind {
            Kind::Leaf(_) => {}
            Kind::Nullable(inner) | Kind::Array { elements: inner, .. } => inner.write_to(out),
            Kind::Map { keys, values, .. } => {
                keys.write_to(out);
                values.write_to(out);
            }
        }
    }
}
