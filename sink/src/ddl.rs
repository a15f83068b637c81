//! The CREATE TABLE statement of an export's table, and the quoting of names and strings.
//!
//! Owns SQL text; pure, any thread. Expressions (`order_by`, `partition_by`, `ttl`, `engine`) are the
//! operator's own SQL and go in as they are; names are always quoted. It does not run anything.

use std::fmt::Write;

use crate::column_type::{ColumnType, write_quoted};
use crate::table::{Column, DefaultKind};

/// Inserts remembered by token: 10 a second, for a quarter of an hour.
const DEDUPLICATION_WINDOW: u32 = 10_000;
/// A week: an outage of the broker over a weekend still resends under a remembered token.
const REPLICATED_WINDOW_SECONDS: u32 = 604_800;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DdlOptions {
    /// Sorting key, such as `(store_id, sold_at)`; by default `(_partition, _offset)`.
    pub order_by: Option<String>,
    pub partition_by: Option<String>,
    /// Such as `sold_at + INTERVAL 90 DAY`.
    pub ttl: Option<String>,
    /// Such as `ReplacingMergeTree(version)`; by default `MergeTree`.
    pub engine: Option<String>,
}

/// A name in backticks.
pub fn quote_ident(name: &str) -> String {
    let mut quoted = String::with_capacity(name.len() + 2);
    quoted.push('`');
    for c in name.chars() {
        match c {
            '`' => quoted.push_str("\\`"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\0' => quoted.push_str("\\0"),
            other => quoted.push(other),
        }
    }
    quoted.push('`');
    quoted
}

/// A string literal.
pub fn quote_string(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    // Writing to a String cannot fail.
    let _ = write_quoted(&mut quoted, text);
    quoted
}

/// The columns of the created table: those given, then the metadata columns they lack.
pub fn with_metadata_columns(columns: &[Column]) -> Vec<Column> {
    let metadata = [
        ("_partition", ColumnType::Int32),
        ("_offset", ColumnType::Int64),
        ("_timestamp", ColumnType::DateTime64 { precision: 3, tz: None }),
        ("_key", ColumnType::String),
    ];
    let mut all = columns.to_vec();
    for (name, ty) in metadata {
        if !columns.iter().any(|c| c.name == name) {
            all.push(Column::new(name, ty));
        }
    }
    all
}

/// `CREATE TABLE IF NOT EXISTS`, so that a repeated start does no harm; compare the table afterwards.
/// `Column` carries no default expression: columns with one must be created by hand and are left out.
pub fn create_table_sql(database: &str, table: &str, columns: &[Column], options: &DdlOptions) -> String {
    let engine = options.engine.as_deref().unwrap_or("MergeTree");
    let merge_tree = engine.contains("MergeTree");
    let order_by = options.order_by.as_deref().unwrap_or("(_partition, _offset)");

    let mut lines: Vec<String> = with_metadata_columns(columns)
        .iter()
        .filter(|column| column.default_kind == DefaultKind::None)
        .map(|column| format!("    {} {}", quote_ident(&column.name), column.ty))
        .collect();
    // Read-back looks rows up by offset; without it in the key, a skip index keeps that in milliseconds.
    if merge_tree && !sorts_by_offset(order_by) {
        lines.push("    INDEX _offset_minmax `_offset` TYPE minmax GRANULARITY 1".to_owned());
    }

    let mut sql = format!(
        "CREATE TABLE IF NOT EXISTS {}.{}\n(\n{}\n)\nENGINE = {engine}",
        quote_ident(database),
        quote_ident(table),
        lines.join(",\n")
    );
    let mut clause = |text: std::fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        let _ = sql.write_fmt(text);
    };
    if merge_tree {
        if let Some(partition_by) = &options.partition_by {
            clause(format_args!("\nPARTITION BY {partition_by}"));
        }
        clause(format_args!("\nORDER BY {order_by}"));
        if let Some(ttl) = &options.ttl {
            clause(format_args!("\nTTL {ttl}"));
        }
        if engine.starts_with("Replicated") || engine.starts_with("Shared") {
            clause(format_args!(
                "\nSETTINGS replicated_deduplication_window = {DEDUPLICATION_WINDOW}, \
                 replicated_deduplication_window_seconds = {REPLICATED_WINDOW_SECONDS}"
            ));
        } else {
            clause(format_args!("\nSETTINGS non_replicated_deduplication_window = {DEDUPLICATION_WINDOW}"));
        }
    }
    sql
}

fn sorts_by_offset(order_by: &str) -> bool {
    let plain: String =
        order_by.chars().filter(|c| !c.is_whitespace() && !matches!(c, '(' | ')' | '`' | '"')).collect();
    let plain = plain.strip_prefix("tuple").unwrap_or(&plain);
    let mut keys = plain.split(',');
    (keys.next(), keys.next()) == (Some("_partition"), Some("_offset"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_closes_every_door() {
        assert_eq!(quote_ident("a`b\\c"), "`a\\`b\\\\c`");
        assert_eq!(quote_string("it's \\ \n"), "'it\\'s \\\\ \\n'");
    }

    #[test]
    fn default_table() {
        let columns = [Column::new("id", ColumnType::Int64)];
        assert_eq!(
            create_table_sql("db", "t", &columns, &DdlOptions::default()),
            "CREATE TABLE IF NOT EXISTS `db`.`t`\n(\n    `id` Int64,\n    `_partition` Int32,\n    \
             `_offset` Int64,\n    `_timestamp` DateTime64(3),\n    `_key` String\n)\nENGINE = MergeTree\n\
             ORDER BY (_partition, _offset)\nSETTINGS non_replicated_deduplication_window = 10000"
        );
    }

    #[test]
    fn own_keys_get_an_index_and_metadata_is_not_doubled() {
        let columns = [
            Column::new("_offset", ColumnType::UInt64),
            Column::new("at", ColumnType::DateTime { tz: None }),
        ];
        let options = DdlOptions {
            order_by: Some("at".into()),
            partition_by: Some("toYYYYMM(at)".into()),
            ttl: Some("at + INTERVAL 1 DAY".into()),
            engine: Some("ReplicatedMergeTree('/p', 'r')".into()),
        };
        let sql = create_table_sql("db", "t", &columns, &options);
        assert_eq!(sql.matches("`_offset` UInt64").count(), 1);
        assert!(!sql.contains("`_offset` Int64"));
        for part in [
            "INDEX _offset_minmax",
            "PARTITION BY toYYYYMM(at)\nORDER BY at\nTTL at + INTERVAL 1 DAY\nSETTINGS replicated_dedup",
            "replicated_deduplication_window_seconds = 604800",
        ] {
            assert!(sql.contains(part), "{part} is not in {sql}");
        }
    }

    #[test]
    fn which_keys_serve_read_back() {
        assert!(sorts_by_offset("(_partition, _offset)"));
        assert!(sorts_by_offset("`_partition`,`_offset`, id"));
        assert!(!sorts_by_offset("(_offset, _partition)"));
        assert!(!sorts_by_offset("tuple()"));
        let memory = DdlOptions { engine: Some("Memory".into()), ..Default::default() };
        assert!(create_table_sql("d", "t", &[], &memory).ends_with("ENGINE = Memory"));
    }
}
