//! What the server says about a table, in the shape `judge` needs.

use serde::Deserialize;

use crate::client::{CallError, ClickHouse};
use crate::column_type::{ColumnType, TypeError};
use crate::config::ExportConfig;
use crate::ddl::{quote_ident, quote_string};
use crate::table::{Column, DefaultKind};

use super::{WINDOW, family};

/// Views followed from one table; more than anybody hangs on one.
const MAX_VIEWS: usize = 100;

#[derive(Clone, Debug)]
pub struct ColumnFacts {
    pub name: String,
    pub ty: Result<ColumnType, TypeError>,
    pub default_kind: DefaultKind,
}

#[derive(Clone, Debug, Default)]
pub struct TableFacts {
    pub database: String,
    pub table: String,
    pub engine: String,
    pub columns: Vec<ColumnFacts>,
    /// Of the kind that counts for the engine.
    pub deduplication_window: u64,
    pub has_ttl: bool,
    pub has_mutations: bool,
    /// The sorting key starts with `_partition, _offset`, or an index covers `_offset`.
    pub finds_offsets_fast: bool,
    pub views: Vec<ViewFacts>,
}

#[derive(Clone, Debug)]
pub struct ViewFacts {
    pub name: String,
    pub target: Option<TargetFacts>,
}

#[derive(Clone, Debug)]
pub struct TargetFacts {
    pub name: String,
    pub deduplication_window: u64,
    /// The statement that gives it a window.
    pub fix: Option<String>,
}

impl TableFacts {
    /// The table that the DDL of `ddl::create_table_sql` makes.
    pub fn created(database: &str, config: &ExportConfig, columns: Vec<Column>) -> TableFacts {
        let engine = config.engine.as_deref().unwrap_or("MergeTree");
        let engine = engine.split(['(', ' ']).next().unwrap_or(engine);
        TableFacts {
            database: database.to_owned(),
            table: config.table.clone(),
            engine: engine.to_owned(),
            columns: columns
                .into_iter()
                .map(|c| ColumnFacts { name: c.name, ty: Ok(c.ty), default_kind: c.default_kind })
                .collect(),
            deduplication_window: if engine.ends_with("MergeTree") { WINDOW } else { 0 },
            has_ttl: config.ttl.is_some(),
            has_mutations: false,
            finds_offsets_fast: true,
            views: Vec::new(),
        }
    }
}

#[derive(Deserialize)]
struct TableRow {
    engine: String,
    engine_full: String,
    create_table_query: String,
    sorting_key: String,
    uuid: String,
    dependencies_database: Vec<String>,
    dependencies_table: Vec<String>,
}

#[derive(Deserialize)]
struct ColumnRow {
    name: String,
    r#type: String,
    default_kind: String,
}

#[derive(Deserialize)]
struct SettingRow {
    name: String,
    value: String,
}

#[derive(Deserialize)]
struct CountRow {
    n: u64,
}

/// Server-wide defaults of the two window settings.
struct Windows {
    plain: u64,
    replicated: u64,
}

async fn table_row(server: &ClickHouse, database: &str, table: &str) -> Result<Option<TableRow>, CallError> {
    let sql = format!(
        "SELECT engine, engine_full, create_table_query, sorting_key, toString(uuid) AS uuid, \
         dependencies_database, dependencies_table FROM system.tables WHERE database = {} AND name = {}",
        quote_string(database),
        quote_string(table)
    );
    Ok(server.rows::<TableRow>(&sql).await?.into_iter().next())
}

async fn windows(server: &ClickHouse) -> Result<Windows, CallError> {
    let rows: Vec<SettingRow> = server
        .rows(
            "SELECT name, value FROM system.merge_tree_settings WHERE name IN \
             ('non_replicated_deduplication_window', 'replicated_deduplication_window')",
        )
        .await?;
    let value = |name: &str| {
        rows.iter().find(|row| row.name == name).and_then(|row| row.value.parse().ok()).unwrap_or(0)
    };
    Ok(Windows {
        plain: value("non_replicated_deduplication_window"),
        replicated: value("replicated_deduplication_window"),
    })
}

fn window_of(row: &TableRow, windows: &Windows) -> u64 {
    let (family, replicated) = family(&row.engine);
    if !family.ends_with("MergeTree") {
        return 0;
    }
    let (name, default) = if replicated {
        ("replicated_deduplication_window", windows.replicated)
    } else {
        ("non_replicated_deduplication_window", windows.plain)
    };
    engine_setting(&row.engine_full, name).unwrap_or(default)
}

/// A number in the SETTINGS clause of `system.tables.engine_full`.
pub(super) fn engine_setting(engine_full: &str, name: &str) -> Option<u64> {
    let settings = engine_full.rsplit_once(" SETTINGS ")?.1;
    settings.split(',').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        if key.trim() != name {
            return None;
        }
        value.trim().trim_matches('\'').parse().ok()
    })
}

/// The name after `TO` in a view's CREATE statement, as `(database, table)`.
pub(super) fn view_target(create: &str) -> Option<(Option<String>, String)> {
    let head = create.split(" AS SELECT").next().unwrap_or(create);
    let at = head.find(" TO ")?;
    let mut names = Vec::new();
    let mut rest = head[at + 4..].trim_start();
    loop {
        let (name, after) = match rest.strip_prefix('`') {
            Some(quoted) => {
                let mut name = String::new();
                let mut chars = quoted.char_indices();
                let end = loop {
                    match chars.next()? {
                        (_, '\\') => name.push(chars.next()?.1),
                        (at, '`') => break at,
                        (_, c) => name.push(c),
                    }
                };
                (name, &quoted[end + 1..])
            }
            None => {
                let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                (rest[..end].to_owned(), &rest[end..])
            }
        };
        if name.is_empty() {
            return None;
        }
        names.push(name);
        match after.strip_prefix('.') {
            Some(after) if names.len() < 2 => rest = after,
            _ => break,
        }
    }
    let table = names.pop()?;
    Some((names.pop(), table))
}

async fn view_facts(
    server: &ClickHouse,
    database: &str,
    view: &str,
    windows: &Windows,
) -> Result<ViewFacts, CallError> {
    let name = format!("{}.{}", quote_ident(database), quote_ident(view));
    let Some(row) = table_row(server, database, view).await? else {
        return Ok(ViewFacts { name, target: None });
    };
    let (target_database, candidates) = match view_target(&row.create_table_query) {
        Some((db, table)) => (db.unwrap_or_else(|| database.to_owned()), vec![table]),
        None => (database.to_owned(), inner_tables(server, database, view, &row.uuid).await?),
    };
    let mut found = None;
    for table in candidates {
        let Some(target) = table_row(server, &target_database, &table).await? else { continue };
        let target_name = format!("{}.{}", quote_ident(&target_database), quote_ident(&table));
        let (family, replicated) = family(&target.engine);
        let setting = if replicated {
            "replicated_deduplication_window"
        } else {
            "non_replicated_deduplication_window"
        };
        let fix = family
            .ends_with("MergeTree")
            .then(|| format!("ALTER TABLE {target_name} MODIFY SETTING {setting} = {WINDOW}"));
        let facts = TargetFacts { name: target_name, deduplication_window: window_of(&target, windows), fix };
        // Where several tables may be the view's own, the worst of them counts.
        if found.as_ref().is_none_or(|f: &TargetFacts| facts.deduplication_window < f.deduplication_window) {
            found = Some(facts);
        }
    }
    Ok(ViewFacts { name, target: found })
}

/// The table of a view that has one of its own: named by the view's id, or by its name in old databases. Some database
/// engines do not tell ids; then it may be any table so named.
async fn inner_tables(
    server: &ClickHouse,
    database: &str,
    view: &str,
    uuid: &str,
) -> Result<Vec<String>, CallError> {
    #[derive(Deserialize)]
    struct Row {
        name: String,
    }
    let mut candidates = vec![format!(".inner_id.{uuid}"), format!(".inner.{view}")];
    if uuid.bytes().all(|b| matches!(b, b'0' | b'-')) {
        let rows: Vec<Row> = server
            .rows(&format!(
                "SELECT name FROM system.tables WHERE database = {} AND startsWith(name, '.inner_id.') LIMIT {MAX_VIEWS}",
                quote_string(database)
            ))
            .await?;
        candidates.extend(rows.into_iter().map(|row| row.name));
    }
    Ok(candidates)
}

/// Everything about the table; `None` if it does not exist. A database that does not exist is an error (81).
pub async fn gather(
    server: &ClickHouse,
    database: &str,
    table: &str,
) -> Result<Option<TableFacts>, CallError> {
    let Some(row) = table_row(server, database, table).await? else {
        let known: CountRow = server
            .rows(&format!(
                "SELECT count() AS n FROM system.databases WHERE name = {}",
                quote_string(database)
            ))
            .await?
            .pop()
            .unwrap_or(CountRow { n: 0 });
        if known.n == 0 {
            return Err(CallError {
                kind: crate::client::CallKind::Exception,
                code: Some(81),
                message: format!("Code: 81. database {} does not exist", quote_ident(database)),
            });
        }
        return Ok(None);
    };
    let columns: Vec<ColumnRow> = server
        .rows(&format!(
            "SELECT name, type, default_kind FROM system.columns WHERE database = {} AND table = {} \
             ORDER BY position",
            quote_string(database),
            quote_string(table)
        ))
        .await?;
    let windows = windows(server).await?;
    let mut views = Vec::new();
    // A view on a view's target sees the same insert, so the graph is followed, breadth first.
    let mut queue: Vec<(String, String)> =
        row.dependencies_database.iter().cloned().zip(row.dependencies_table.iter().cloned()).collect();
    let mut at = 0;
    while at < queue.len() && at < MAX_VIEWS {
        let (db, view) = queue[at].clone();
        at += 1;
        let facts = view_facts(server, &db, &view, &windows).await?;
        if let Some(view_row) = table_row(server, &db, &view).await?
            && let Some((target_db, target)) = view_target(&view_row.create_table_query)
            && let Some(target_row) = table_row(server, target_db.as_deref().unwrap_or(&db), &target).await?
        {
            for next in target_row.dependencies_database.iter().cloned().zip(target_row.dependencies_table) {
                if !queue.contains(&next) {
                    queue.push(next);
                }
            }
        }
        views.push(facts);
    }
    let mutations: Option<CountRow> = server
        .rows(&format!(
            "SELECT count() AS n FROM system.mutations WHERE database = {} AND table = {}",
            quote_string(database),
            quote_string(table)
        ))
        .await?
        .pop();
    let key: String = row.sorting_key.chars().filter(|c| !c.is_whitespace() && *c != '`').collect();
    let finds_offsets_fast = key == "_partition,_offset"
        || key.starts_with("_partition,_offset,")
        || row.create_table_query.split("INDEX ").skip(1).any(|index| {
            index.split(" TYPE ").next().is_some_and(|expression| expression.contains("_offset"))
        });
    Ok(Some(TableFacts {
        database: database.to_owned(),
        table: table.to_owned(),
        engine: row.engine.clone(),
        columns: columns
            .into_iter()
            .map(|c| ColumnFacts {
                ty: ColumnType::parse(&c.r#type),
                name: c.name,
                // A kind that is not known is left to the server, as its value would be.
                default_kind: DefaultKind::parse(&c.default_kind).unwrap_or(DefaultKind::Materialized),
            })
            .collect(),
        deduplication_window: window_of(&row, &windows),
        has_ttl: row.engine_full.contains(" TTL "),
        has_mutations: mutations.is_some_and(|row| row.n > 0),
        finds_offsets_fast,
        views,
    }))
}
