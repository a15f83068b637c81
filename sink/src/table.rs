//! A ClickHouse table as the export sees it: names, engine, columns in order.
//!
//! Owns plain data, filled from `system.columns` or from what a user declares. Pure, any thread. It does not
//! ask a server and does not decide which columns are sent (`mapping`).

use crate::column_type::ColumnType;

/// How the server fills a column that an insert does not name (`system.columns.default_kind`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DefaultKind {
    #[default]
    None,
    Default,
    Materialized,
    Alias,
    Ephemeral,
}

impl DefaultKind {
    /// Reads `system.columns.default_kind`; a word it does not know is not guessed at.
    pub fn parse(text: &str) -> Option<DefaultKind> {
        Some(match text {
            "" => DefaultKind::None,
            "DEFAULT" => DefaultKind::Default,
            "MATERIALIZED" => DefaultKind::Materialized,
            "ALIAS" => DefaultKind::Alias,
            "EPHEMERAL" => DefaultKind::Ephemeral,
            _ => return None,
        })
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    pub name: String,
    pub ty: ColumnType,
    pub default_kind: DefaultKind,
}

impl Column {
    /// A column without a default.
    pub fn new(name: impl Into<String>, ty: ColumnType) -> Column {
        Column { name: name.into(), ty, default_kind: DefaultKind::None }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct TableSchema {
    pub database: String,
    pub table: String,
    pub engine: String,
    pub columns: Vec<Column>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_kinds_as_the_server_names_them() {
        assert_eq!(DefaultKind::parse(""), Some(DefaultKind::None));
        assert_eq!(DefaultKind::parse("ALIAS"), Some(DefaultKind::Alias));
        assert_eq!(DefaultKind::parse("EPHEMERAL"), Some(DefaultKind::Ephemeral));
        assert_eq!(DefaultKind::parse("something new"), None);
    }
}
