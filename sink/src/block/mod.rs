//! ClickHouse Native blocks, built column by column from records.
//!
//! Owns the row discipline: a row is in every column or in none. Pure, one thread per builder, no clock.
//! Invariants: the same mapping and the same records in the same order give the same bytes; a refused record
//! leaves no trace; one `finish` is one block, as `INSERT ... FORMAT Native` over HTTP expects it (no block
//! info: varint columns, varint rows, then per column name, type, data). It does not decide when a block is
//! full, and does not send.

pub(crate) mod leaf;
pub(crate) mod node;
#[cfg(test)]
mod tests;

use bytes::Bytes;

use crate::json::{self, FieldOrder, code};
use crate::mapping::{MappedColumn, RowMapping, Source};

pub use crate::json::RowError;
use leaf::{Rules, put_text, put_varint};
use node::{MAX_ROW_BYTES, Node};

/// What a record brings besides its value.
#[derive(Clone, Copy, Debug)]
pub struct RowMeta<'a> {
    pub topic: &'a str,
    pub partition: i32,
    pub offset: i64,
    /// -1 when the record has none.
    pub timestamp_ms: i64,
    pub key: Option<&'a [u8]>,
}

#[derive(Debug)]
pub struct BlockBuilder {
    mapping: RowMapping,
    rules: Rules,
    nodes: Vec<Node>,
    order: FieldOrder,
    rows: usize,
    /// Of column data, whole rows only.
    bytes: usize,
}

impl BlockBuilder {
    pub fn new(mapping: &RowMapping) -> BlockBuilder {
        let options = mapping.options();
        BlockBuilder {
            rules: Rules {
                json_text_in_strings: options.json_text_in_strings,
                truncate_time_fraction: options.truncate_time_fraction,
                time_unit: options.time_unit,
            },
            nodes: mapping.columns().iter().map(|column| Node::new(&column.wire)).collect(),
            order: FieldOrder::new(mapping),
            rows: 0,
            bytes: 0,
            mapping: mapping.clone(),
        }
    }

    pub fn mapping(&self) -> &RowMapping {
        &self.mapping
    }

    /// Adds one record. After an error the block is as it was before.
    pub fn push_json(&mut self, meta: &RowMeta<'_>, value: Option<&[u8]>) -> Result<(), RowError> {
        let value = value
            .ok_or_else(|| RowError::new(code::TOMBSTONE, None, "the record has no value (tombstone)"))?;
        if value.len() > MAX_ROW_BYTES {
            return Err(RowError::new(code::ROW_TOO_LARGE, None, "the record exceeds 64 MiB"));
        }
        let text = std::str::from_utf8(value).map_err(|e| {
            let message = format!("the record is not UTF-8 at byte {}", e.valid_up_to());
            RowError::new(code::BAD_UTF8, None, message)
        })?;
        match self.push_row(meta, text) {
            Ok(()) => {
                self.bytes = self.nodes.iter_mut().map(Node::commit).sum();
                self.rows += 1;
                Ok(())
            }
            Err(error) => {
                self.nodes.iter_mut().for_each(Node::rollback);
                Err(error)
            }
        }
    }

    fn push_row(&mut self, meta: &RowMeta<'_>, text: &str) -> Result<(), RowError> {
        let filled = json::decode_record(text, &self.mapping, &mut self.nodes, &mut self.order, &self.rules)?;
        let complete = filled == self.mapping.json_columns();
        for (at, (column, node)) in self.mapping.columns().iter().zip(&mut self.nodes).enumerate() {
            let pushed = match column.source {
                Source::Json => {
                    if !complete && !self.order.was_seen(at) && !node.push_missing() {
                        return Err(missing_field(column));
                    }
                    Ok(())
                }
                Source::Partition => node.push_int(meta.partition.into()),
                Source::Offset => node.push_int(meta.offset),
                Source::Timestamp => node.push_timestamp_ms(meta.timestamp_ms),
                Source::Key => node.push_bytes(meta.key),
                Source::Topic => node.push_bytes(Some(meta.topic.as_bytes())),
            };
            pushed.map_err(|cell| RowError::of_cell(&column.name, cell))?;
        }
        Ok(())
    }

    /// Rows in the block so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Bytes of column data so far; the finished block adds a header of names and types.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The block, exactly one; the builder is empty again and keeps its memory for the next.
    pub fn finish(&mut self) -> Bytes {
        let columns = self.mapping.columns();
        let types: Vec<String> = columns.iter().map(|column| column.wire.to_string()).collect();
        let header: usize = columns.iter().zip(&types).map(|(c, ty)| c.name.len() + ty.len() + 20).sum();
        let mut out = Vec::with_capacity(self.bytes() + header + 20);
        put_varint(&mut out, columns.len() as u64);
        put_varint(&mut out, self.rows as u64);
        for ((column, ty), node) in columns.iter().zip(&types).zip(&self.nodes) {
            put_text(&mut out, column.name.as_bytes());
            put_text(&mut out, ty.as_bytes());
            node.write_to(&mut out);
        }
        self.clear();
        Bytes::from(out)
    }

    /// Drops all rows.
    pub fn clear(&mut self) {
        self.nodes.iter_mut().for_each(Node::clear);
        (self.rows, self.bytes) = (0, 0);
    }
}

fn missing_field(column: &MappedColumn) -> RowError {
    let mut message = format!("the record has no such field, and {} cannot be null", column.declared);
    if column.has_default {
        message.push_str("; to let the server's DEFAULT fill it, name it in server_default_columns");
    }
    RowError::new(code::MISSING_FIELD, Some(&column.name), message)
}
