//! Which columns an export sends, and where each value comes from.
//!
//! Owns the decision, made once per schema version; pure, any thread, cheap to clone. Invariants: sent columns
//! keep the table's order, names are distinct, and a metadata column has a type its value always fits (or is
//! range-checked per row). It does not decode records (`json`, `block`) and does not judge engines or views.
//!
//! Rules:
//! - `_partition`, `_offset`, `_timestamp`, `_key`, `_topic` come from the record's metadata. A JSON field of
//!   such a name is an unknown field: a producer cannot forge an offset.
//! - MATERIALIZED, ALIAS and EPHEMERAL columns are never sent.
//! - Every other column takes the JSON field of exactly its name. A missing field is NULL for a Nullable
//!   column, empty for Array and Map, and a row error for everything else, DEFAULT or not: within one block a
//!   column is sent for every row or for none. Columns that the server shall fill are named in
//!   `server_default_columns` and left out of the insert.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::column_type::ColumnType;
use crate::ddl::quote_ident;
use crate::table::{DefaultKind, TableSchema};

/// Version of the bytes that `BlockBuilder` makes from a record. Recorded in every plan: a resend must be
/// byte-identical, so a change of decoding or encoding rules raises it.
pub const ENCODER_VERSION: u32 = 2;

/// More columns than any table in use; bounds memory per builder.
pub const MAX_COLUMNS: usize = 10_000;

/// What becomes of a JSON field that no sent column takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownFields {
    #[default]
    Ignore,
    DeadLetter,
}

/// What a whole number in a time column counts, from 1970. A number with a fraction counts seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeUnit {
    /// By its size: up to 1e11 seconds, up to 1e14 milliseconds, up to 1e17 microseconds, beyond it nanoseconds. Right
    /// for every time from 1973 to 5138.
    #[default]
    BySize,
    Seconds,
    Milliseconds,
    Microseconds,
    Nanoseconds,
}

impl TimeUnit {
    pub const ALL: [TimeUnit; 5] = [
        TimeUnit::BySize,
        TimeUnit::Seconds,
        TimeUnit::Milliseconds,
        TimeUnit::Microseconds,
        TimeUnit::Nanoseconds,
    ];

    /// The fraction digits of a second that `value` counts.
    pub(crate) fn digits(self, value: i64) -> u8 {
        match self {
            TimeUnit::BySize => match value.unsigned_abs() {
                0..100_000_000_000 => 0,
                ..100_000_000_000_000 => 3,
                ..100_000_000_000_000_000 => 6,
                _ => 9,
            },
            TimeUnit::Seconds => 0,
            TimeUnit::Milliseconds => 3,
            TimeUnit::Microseconds => 6,
            TimeUnit::Nanoseconds => 9,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingOptions {
    pub unknown_fields: UnknownFields,
    /// Columns left out of the insert, so that the server fills them.
    pub server_default_columns: Vec<String>,
    /// A String column takes any JSON value but null: a number, bool, object or array is stored as its JSON
    /// text, unchanged (as ClickHouse's own JSON formats do). Off: only strings.
    pub json_text_in_strings: bool,
    /// A timestamp finer than its column is cut to the column's precision, towards the past. Off: a row error.
    pub truncate_time_fraction: bool,
    pub time_unit: TimeUnit,
}

impl Default for MappingOptions {
    fn default() -> MappingOptions {
        MappingOptions {
            unknown_fields: UnknownFields::Ignore,
            server_default_columns: Vec::new(),
            json_text_in_strings: true,
            truncate_time_fraction: true,
            time_unit: TimeUnit::BySize,
        }
    }
}

/// Where a sent column's value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The JSON field of the column's name.
    Json,
    Partition,
    Offset,
    Timestamp,
    Key,
    Topic,
}

#[derive(Clone, Debug, PartialEq)]
pub struct MappedColumn {
    pub name: String,
    /// The table's type.
    pub declared: ColumnType,
    /// The type in the block (LowCardinality is sent plain).
    pub wire: ColumnType,
    pub source: Source,
    /// The table has a DEFAULT for it, which only `server_default_columns` brings into play.
    pub has_default: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    #[error("table {table} has no column that the export could fill")]
    NoColumns { table: String },
    #[error("table {table} has {columns} columns, more than {MAX_COLUMNS}")]
    TooManyColumns { table: String, columns: usize },
    #[error("column {column} occurs twice")]
    DuplicateColumn { column: String },
    #[error("metadata column {column} has type {found}; it must be {allowed}")]
    MetadataType { column: String, found: String, allowed: &'static str },
    #[error("server_default_columns names {column}, which is not a column of table {table}")]
    UnknownServerDefault { column: String, table: String },
}

#[derive(Clone, Debug)]
pub struct RowMapping {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    columns: Vec<MappedColumn>,
    /// JSON-sourced columns sorted by name, for fields that come out of order.
    by_name: Vec<u32>,
    json_columns: usize,
    options: MappingOptions,
}

impl RowMapping {
    pub fn new(table: &TableSchema, options: &MappingOptions) -> Result<RowMapping, MappingError> {
        let table_name = || format!("{}.{}", quote_ident(&table.database), quote_ident(&table.table));
        if table.columns.len() > MAX_COLUMNS {
            return Err(MappingError::TooManyColumns { table: table_name(), columns: table.columns.len() });
        }
        let mut names = BTreeSet::new();
        for column in &table.columns {
            if !names.insert(column.name.as_str()) {
                return Err(MappingError::DuplicateColumn { column: column.name.clone() });
            }
        }
        if let Some(column) = options.server_default_columns.iter().find(|c| !names.contains(c.as_str())) {
            return Err(MappingError::UnknownServerDefault { column: column.clone(), table: table_name() });
        }
        let left_out: BTreeSet<&str> = options.server_default_columns.iter().map(String::as_str).collect();

        let mut columns = Vec::new();
        for column in &table.columns {
            let filled_by_server = matches!(
                column.default_kind,
                DefaultKind::Materialized | DefaultKind::Alias | DefaultKind::Ephemeral
            );
            if filled_by_server || left_out.contains(column.name.as_str()) {
                continue;
            }
            let source = source_of(&column.name, &column.ty)?;
            columns.push(MappedColumn {
                name: column.name.clone(),
                declared: column.ty.clone(),
                wire: column.ty.wire(),
                source,
                has_default: column.default_kind == DefaultKind::Default,
            });
        }
        if columns.is_empty() {
            return Err(MappingError::NoColumns { table: table_name() });
        }
        let mut by_name: Vec<u32> =
            (0u32..).zip(&columns).filter(|(_, c)| c.source == Source::Json).map(|(at, _)| at).collect();
        by_name.sort_by(|a, b| columns[*a as usize].name.cmp(&columns[*b as usize].name));
        let json_columns = by_name.len();
        Ok(RowMapping { inner: Arc::new(Inner { columns, by_name, json_columns, options: options.clone() }) })
    }

    /// The sent columns, in the table's order.
    pub fn columns(&self) -> &[MappedColumn] {
        &self.inner.columns
    }

    pub fn options(&self) -> &MappingOptions {
        &self.inner.options
    }

    /// Whether rows can be found again by partition and offset, which exactly-once needs.
    pub fn has_offset_columns(&self) -> bool {
        let has = |source| self.inner.columns.iter().any(|c| c.source == source);
        has(Source::Partition) && has(Source::Offset)
    }

    /// `ENCODER_VERSION`, for the plan.
    pub fn version(&self) -> u32 {
        ENCODER_VERSION
    }

    /// Checksum of everything that decides a row's bytes: sent columns, their types, sources and the options.
    /// Equal fingerprints and equal encoder versions mean equal blocks.
    pub fn fingerprint(&self) -> u32 {
        let mut text = String::new();
        for column in &self.inner.columns {
            text.push_str(&format!("{}\0{}\0{:?}\0", column.name, column.declared, column.source));
        }
        text.push_str(&format!("{:?}", self.inner.options));
        crc32c::crc32c(text.as_bytes())
    }

    /// The quoted column list of the INSERT, without parentheses. With it in the statement, a column that has
    /// since been dropped is an error there, not a column of the block that the server ignores.
    pub fn insert_columns(&self) -> String {
        let quoted: Vec<String> = self.inner.columns.iter().map(|c| quote_ident(&c.name)).collect();
        quoted.join(", ")
    }

    pub(crate) fn json_columns(&self) -> usize {
        self.inner.json_columns
    }

    /// The JSON-sourced column of this name.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        let by_name = &self.inner.by_name;
        let at =
            by_name.binary_search_by(|at| self.inner.columns[*at as usize].name.as_str().cmp(name)).ok()?;
        by_name.get(at).map(|at| *at as usize)
    }
}

fn source_of(name: &str, ty: &ColumnType) -> Result<Source, MappingError> {
    let wire = ty.wire();
    let plain = wire.scalar();
    let (source, fits, allowed) = match name {
        "_partition" => (Source::Partition, plain.int_range().is_some(), "an integer type such as Int32"),
        "_offset" => {
            (Source::Offset, matches!(plain, ColumnType::Int64 | ColumnType::UInt64), "Int64 or UInt64")
        }
        "_timestamp" => (
            Source::Timestamp,
            matches!(plain, ColumnType::DateTime { .. } | ColumnType::DateTime64 { .. }),
            "DateTime64 or DateTime",
        ),
        "_key" => (Source::Key, matches!(plain, ColumnType::String), "String or Nullable(String)"),
        "_topic" => (Source::Topic, matches!(plain, ColumnType::String), "String or LowCardinality(String)"),
        _ => return Ok(Source::Json),
    };
    if !fits {
        return Err(MappingError::MetadataType { column: name.to_owned(), found: ty.to_string(), allowed });
    }
    Ok(source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Column;

    fn table(columns: &[(&str, &str, DefaultKind)]) -> TableSchema {
        TableSchema {
            database: "db".into(),
            table: "t".into(),
            engine: "MergeTree".into(),
            columns: columns
                .iter()
                .map(|(name, ty, default_kind)| Column {
                    name: (*name).into(),
                    ty: ColumnType::parse(ty).unwrap(),
                    default_kind: *default_kind,
                })
                .collect(),
        }
    }

    #[test]
    fn chooses_columns_and_sources() {
        let t = table(&[
            ("id", "Int64", DefaultKind::None),
            ("at", "DateTime", DefaultKind::Default),
            ("day", "Date", DefaultKind::Materialized),
            ("al", "Date", DefaultKind::Alias),
            ("eph", "Int8", DefaultKind::Ephemeral),
            ("name", "LowCardinality(String)", DefaultKind::Default),
            ("_partition", "Int32", DefaultKind::None),
            ("_offset", "UInt64", DefaultKind::None),
            ("_timestamp", "DateTime64(3)", DefaultKind::None),
            ("_key", "Nullable(String)", DefaultKind::None),
            ("_topic", "LowCardinality(String)", DefaultKind::None),
        ]);
        let options = MappingOptions { server_default_columns: vec!["at".into()], ..Default::default() };
        let mapping = RowMapping::new(&t, &options).unwrap();
        let sent: Vec<(&str, Source)> =
            mapping.columns().iter().map(|c| (c.name.as_str(), c.source)).collect();
        assert_eq!(
            sent,
            [
                ("id", Source::Json),
                ("name", Source::Json),
                ("_partition", Source::Partition),
                ("_offset", Source::Offset),
                ("_timestamp", Source::Timestamp),
                ("_key", Source::Key),
                ("_topic", Source::Topic),
            ]
        );
        assert!(mapping.has_offset_columns());
        assert_eq!(mapping.find("name"), Some(1));
        assert_eq!(mapping.find("_offset"), None);
        assert_eq!(mapping.find("day"), None);
        assert!(mapping.insert_columns().starts_with("`id`, `name`, "));
        let other = RowMapping::new(&t, &MappingOptions::default()).unwrap();
        assert_ne!(mapping.fingerprint(), other.fingerprint());
    }

    #[test]
    fn refuses_with_a_reason() {
        let bad_offset = table(&[("_offset", "Int32", DefaultKind::None)]);
        assert!(matches!(
            RowMapping::new(&bad_offset, &MappingOptions::default()),
            Err(MappingError::MetadataType { .. })
        ));
        let none = table(&[("a", "Int8", DefaultKind::Alias)]);
        assert!(matches!(
            RowMapping::new(&none, &MappingOptions::default()),
            Err(MappingError::NoColumns { .. })
        ));
        let twice = table(&[("a", "Int8", DefaultKind::None), ("a", "Int8", DefaultKind::None)]);
        assert!(matches!(
            RowMapping::new(&twice, &MappingOptions::default()),
            Err(MappingError::DuplicateColumn { .. })
        ));
        let one = table(&[("a", "Int8", DefaultKind::None)]);
        let options = MappingOptions { server_default_columns: vec!["b".into()], ..Default::default() };
        assert!(matches!(RowMapping::new(&one, &options), Err(MappingError::UnknownServerDefault { .. })));
        assert!(!RowMapping::new(&one, &MappingOptions::default()).unwrap().has_offset_columns());
    }
}
