//! What a table can promise, decided when an export is turned on and each time it starts.
//!
//! Owns the judgement (`judge`, pure), and gathering what it needs from the server (`gather`, `admit`). Invariants: only
//! what the requested delivery needs is refused; every refusal says what to do; nothing is created or altered here
//! (`admit` hands out the DDL, the exporter or the operator runs it). It does not look at rows.

mod facts;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use facts::{TableFacts, ViewFacts, gather};

use crate::client::{CallError, ClickHouse};
use crate::config::{Delivery, ExportConfig};
use crate::ddl::{DdlOptions, create_table_sql, quote_ident};
use crate::infer::infer_columns;
use crate::mapping::{MappingOptions, RowMapping};
use crate::settle::Traits;
use crate::table::{Column, TableSchema};

/// Tokens remembered by a table that Flumen creates or asks to alter: 10 inserts a second for a quarter of an hour.
pub const WINDOW: u64 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    ExactlyOnce,
    /// Exactly once in the table; its materialized views may count rows twice or miss them after a crash of the server.
    ExactlyOnceTableOnly,
    /// Retries are recognised by ClickHouse; a crash of the server during an insert may lose rows.
    TokenOnly,
    /// A retry may repeat rows.
    AtLeastOnce,
    /// Not admitted.
    None,
}

/// The answer to "may this topic be exported into this table, and with which promise".
#[derive(Clone, Debug, Serialize)]
pub struct Admission {
    pub admitted: bool,
    pub guarantee: Guarantee,
    /// Why it is refused. Empty if admitted.
    pub reasons: Vec<String>,
    /// Statements that would lift refusals.
    pub fixes: Vec<String>,
    pub warnings: Vec<String>,
    /// The statement that creates the table, if it does not exist and may be created.
    pub ddl: Option<String>,
    /// The table is created from the topic's first record, and there is none yet.
    pub waits_for_record: bool,
    /// The table as it is, or as `ddl` makes it.
    #[serde(skip)]
    pub schema: Option<TableSchema>,
    #[serde(skip)]
    pub options: MappingOptions,
    #[serde(skip)]
    pub traits: Option<Traits>,
    /// Rows vanish by themselves, so a missing row proves nothing (TTL, mutations).
    #[serde(skip)]
    pub rows_may_vanish: bool,
}

impl Admission {
    fn refused(reasons: Vec<String>, fixes: Vec<String>) -> Admission {
        Admission {
            admitted: false,
            guarantee: Guarantee::None,
            reasons,
            fixes,
            warnings: Vec::new(),
            ddl: None,
            waits_for_record: false,
            schema: None,
            options: MappingOptions::default(),
            traits: None,
            rows_may_vanish: false,
        }
    }
}

pub fn mapping_options(config: &ExportConfig) -> MappingOptions {
    MappingOptions {
        unknown_fields: config.unknown_fields,
        server_default_columns: config.server_default_columns.clone(),
        time_unit: config.time_unit,
        ..MappingOptions::default()
    }
}

/// Asks the server about the table and judges it. `samples` are record values, used only where columns must be guessed.
pub async fn admit(
    server: &ClickHouse,
    database: &str,
    config: &ExportConfig,
    samples: &[&[u8]],
) -> Result<Admission, CallError> {
    match gather(server, database, &config.table).await? {
        Some(facts) => Ok(judge(&facts, config)),
        None => Ok(plan_creation(database, config, samples)),
    }
}

/// The table does not exist: what would be created.
pub fn plan_creation(database: &str, config: &ExportConfig, samples: &[&[u8]]) -> Admission {
    let name = format!("{}.{}", quote_ident(database), quote_ident(&config.table));
    if !config.auto_create {
        return Admission::refused(
            vec![format!("table {name} does not exist; create it or set flumen.clickhouse.auto.create=true")],
            vec![format!("flumen topic alter {} --config flumen.clickhouse.auto.create=true", config.topic)],
        );
    }
    let columns = match (&config.columns, samples.is_empty()) {
        (Some(columns), _) => columns.clone(),
        (None, true) => {
            let facts = TableFacts::created(database, config, crate::ddl::with_metadata_columns(&[]));
            let mut admission = judge(&facts, config);
            admission.waits_for_record = admission.admitted;
            admission.warnings.push(format!(
                "table {name} is created when the topic holds its first record, with columns taken from it; to choose \
                 them, set flumen.clickhouse.columns"
            ));
            return admission;
        }
        (None, false) => match infer_columns(samples.iter().copied()) {
            Ok(columns) => columns,
            Err(e) => {
                return Admission::refused(
                    vec![format!(
                        "columns of table {name} cannot be taken from the topic's records: {e}; set \
                         flumen.clickhouse.columns"
                    )],
                    Vec::new(),
                );
            }
        },
    };
    let options = DdlOptions {
        order_by: config.order_by.clone(),
        partition_by: config.partition_by.clone(),
        ttl: config.ttl.clone(),
        engine: config.engine.clone(),
    };
    let ddl = create_table_sql(database, &config.table, &columns, &options);
    let facts = TableFacts::created(database, config, crate::ddl::with_metadata_columns(&columns));
    Admission { ddl: Some(ddl), ..judge(&facts, config) }
}

/// The engine's family without its replication.
fn family(engine: &str) -> (&str, bool) {
    for prefix in ["Replicated", "Shared"] {
        if let Some(rest) = engine.strip_prefix(prefix).filter(|rest| rest.ends_with("MergeTree")) {
            return (rest, true);
        }
    }
    (engine, false)
}

/// Pure: the promise that this table allows, or why there is none.
pub fn judge(facts: &TableFacts, config: &ExportConfig) -> Admission {
    let mut reasons = Vec::new();
    let mut fixes = Vec::new();
    let mut warnings = Vec::new();
    let name = format!("{}.{}", quote_ident(&facts.database), quote_ident(&facts.table));
    let (family, replicated) = family(&facts.engine);
    let merge_tree = family.ends_with("MergeTree");
    let window_setting =
        if replicated { "replicated_deduplication_window" } else { "non_replicated_deduplication_window" };
    let deduplicates = merge_tree && facts.deduplication_window > 0;

    let (schema, options) = columns_of(facts, config, &mut reasons);
    let mapping = RowMapping::new(&schema, &options);
    if let Err(e) = &mapping {
        reasons.push(e.to_string());
    }

    if matches!(facts.engine.as_str(), "View" | "MaterializedView" | "Kafka" | "Dictionary" | "Merge") {
        reasons.push(format!("{name} is a {}; name a table that rows can be inserted into", facts.engine));
    }
    let needs_token = config.delivery != Delivery::AtLeastOnce;
    if facts.engine == "Distributed" && needs_token {
        reasons.push(format!(
            "{name} is Distributed: an insert through it is several inserts whose outcomes are not reported one by \
             one; export into the local table of a shard, or set flumen.clickhouse.delivery=at_least_once"
        ));
    } else if !merge_tree && needs_token {
        reasons.push(format!(
            "engine {} of {name} does not remember deduplication tokens; {} needs a MergeTree table, or set \
             flumen.clickhouse.delivery=at_least_once",
            facts.engine,
            config.delivery.as_str()
        ));
    } else if needs_token && !deduplicates {
        let fix = format!("ALTER TABLE {name} MODIFY SETTING {window_setting} = {WINDOW}");
        reasons.push(format!(
            "{name} does not remember deduplication tokens ({window_setting} is 0); run: {fix}"
        ));
        fixes.push(fix);
    }

    let exact = config.delivery == Delivery::ExactlyOnce;
    if exact && merge_tree && family != "MergeTree" {
        reasons.push(format!(
            "engine {} of {name} merges rows away, so it cannot be counted what arrived; exactly_once needs \
             (Replicated)MergeTree, or set flumen.clickhouse.delivery=token_only",
            facts.engine
        ));
    }
    if exact && mapping.as_ref().is_ok_and(|m| !m.has_offset_columns()) {
        let fix = format!(
            "ALTER TABLE {name} ADD COLUMN `_partition` Int32, ADD COLUMN `_offset` Int64, ADD INDEX \
             _offset_minmax `_offset` TYPE minmax GRANULARITY 1"
        );
        reasons.push(format!(
            "{name} has no columns _partition and _offset, by which rows are found again after an unclear insert; \
             run: {fix}; or set flumen.clickhouse.delivery=token_only"
        ));
        fixes.push(fix);
    }
    let mut table_only = false;
    if needs_token && merge_tree {
        judge_views(facts, config, replicated, &mut reasons, &mut fixes, &mut warnings, &mut table_only);
    }
    if needs_token && deduplicates && facts.deduplication_window < 100 {
        warnings.push(format!(
            "{name} remembers only {} parts ({window_setting}); {WINDOW} covers a quarter of an hour of retries",
            facts.deduplication_window
        ));
    }
    if exact && merge_tree && !facts.finds_offsets_fast {
        warnings.push(format!(
            "neither the sorting key nor an index of {name} leads to _offset: looking up an unclear insert reads the \
             whole column; run: ALTER TABLE {name} ADD INDEX _offset_minmax `_offset` TYPE minmax GRANULARITY 1"
        ));
    }
    if exact && !replicated {
        warnings.push(
            "a power failure of the ClickHouse host may lose the last minutes of rows; the audit inserts them again \
             while the topic still has them"
                .to_owned(),
        );
    }
    if facts.has_ttl && exact {
        warnings.push(format!("{name} has a TTL: the audit counts its rows but does not repair them"));
    }

    let admitted = reasons.is_empty();
    let guarantee = match config.delivery {
        _ if !admitted => Guarantee::None,
        Delivery::ExactlyOnce if table_only => Guarantee::ExactlyOnceTableOnly,
        Delivery::ExactlyOnce => Guarantee::ExactlyOnce,
        Delivery::TokenOnly => Guarantee::TokenOnly,
        Delivery::AtLeastOnce => Guarantee::AtLeastOnce,
    };
    Admission {
        admitted,
        guarantee,
        reasons,
        fixes,
        warnings,
        ddl: None,
        waits_for_record: false,
        schema: Some(schema),
        options,
        traits: Some(Traits {
            read_back: exact,
            deduplicates,
            token_commits_with_part: replicated,
            has_views: !facts.views.is_empty(),
        }),
        rows_may_vanish: facts.has_ttl || facts.has_mutations,
    }
}

fn judge_views(
    facts: &TableFacts,
    config: &ExportConfig,
    replicated: bool,
    reasons: &mut Vec<String>,
    fixes: &mut Vec<String>,
    warnings: &mut Vec<String>,
    table_only: &mut bool,
) {
    let exact = config.delivery == Delivery::ExactlyOnce;
    for view in &facts.views {
        let problem = match &view.target {
            None => Some(format!(
                "the target of materialized view {} cannot be found, so it is not known whether a retried insert \
                 doubles its rows",
                view.name
            )),
            Some(target) if target.deduplication_window == 0 => {
                if let Some(fix) = &target.fix {
                    fixes.push(fix.clone());
                }
                let run = target.fix.as_ref().map(|fix| format!("; run: {fix}")).unwrap_or_default();
                Some(format!(
                    "materialized view {} writes into {}, which does not remember deduplication tokens: a retried \
                     insert doubles its rows{run}",
                    view.name, target.name
                ))
            }
            Some(_) => None,
        };
        match problem {
            Some(problem) if config.views_may_differ => {
                warnings.push(problem);
                *table_only = exact;
            }
            Some(problem) => reasons.push(problem),
            None => {}
        }
    }
    if exact && !replicated && !facts.views.is_empty() {
        let names: Vec<&str> = facts.views.iter().map(|view| view.name.as_str()).collect();
        let problem = format!(
            "materialized views hang on the plain MergeTree table ({}): if a crash of the server loses rows, \
             inserting them again cannot be made exact for the views",
            names.join(", ")
        );
        if config.views_may_differ {
            warnings.push(problem);
            *table_only = true;
        } else {
            reasons.push(format!(
                "{problem}; use a Replicated table, or set flumen.clickhouse.delivery=token_only, or \
                 flumen.clickhouse.views=warn to keep the promise for the table alone"
            ));
        }
    }
}

/// The columns the encoder can write; the others must be left to the server.
fn columns_of(
    facts: &TableFacts,
    config: &ExportConfig,
    reasons: &mut Vec<String>,
) -> (TableSchema, MappingOptions) {
    let mut options = mapping_options(config);
    let mut columns = Vec::new();
    for column in &facts.columns {
        match &column.ty {
            Ok(ty) => columns.push(Column {
                name: column.name.clone(),
                ty: ty.clone(),
                default_kind: column.default_kind,
            }),
            Err(e) => {
                use crate::table::DefaultKind as Kind;
                let filled =
                    matches!(column.default_kind, Kind::Materialized | Kind::Alias | Kind::Ephemeral);
                let left_out = options.server_default_columns.iter().any(|name| *name == column.name);
                options.server_default_columns.retain(|name| *name != column.name);
                if !filled && !left_out {
                    reasons.push(format!(
                        "column {}: {e}; name it in flumen.clickhouse.server.default.columns to leave it to the \
                         table's default",
                        column.name
                    ));
                }
            }
        }
    }
    let schema = TableSchema {
        database: facts.database.clone(),
        table: facts.table.clone(),
        engine: facts.engine.clone(),
        columns,
    };
    (schema, options)
}
