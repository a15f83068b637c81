use std::collections::BTreeMap;

use super::facts::{ColumnFacts, TargetFacts, engine_setting, view_target};
use super::*;
use crate::column_type::ColumnType;
use crate::table::DefaultKind;

fn config(pairs: &[(&str, &str)]) -> ExportConfig {
    let mut configs: BTreeMap<String, String> =
        pairs.iter().map(|(k, v)| (format!("flumen.clickhouse.{k}"), (*v).to_owned())).collect();
    configs.insert("flumen.clickhouse.enable".into(), "true".into());
    ExportConfig::from_topic("orders", &configs).unwrap().unwrap()
}

fn facts(engine: &str, columns: &[(&str, &str)]) -> TableFacts {
    TableFacts {
        database: "db".into(),
        table: "orders".into(),
        engine: engine.into(),
        columns: columns
            .iter()
            .map(|(name, ty)| ColumnFacts {
                name: (*name).into(),
                ty: ColumnType::parse(ty),
                default_kind: DefaultKind::None,
            })
            .collect(),
        deduplication_window: 1000,
        finds_offsets_fast: true,
        ..TableFacts::default()
    }
}

const WITH_OFFSETS: &[(&str, &str)] = &[("id", "Int64"), ("_partition", "Int32"), ("_offset", "Int64")];

#[test]
fn plain_merge_tree_with_window_is_exact() {
    let admission = judge(&facts("MergeTree", WITH_OFFSETS), &config(&[]));
    assert!(admission.admitted, "{:?}", admission.reasons);
    assert_eq!(admission.guarantee, Guarantee::ExactlyOnce);
    assert!(admission.traits.unwrap().read_back);
}

#[test]
fn refusals_name_the_statement_that_lifts_them() {
    let mut no_window = facts("MergeTree", WITH_OFFSETS);
    no_window.deduplication_window = 0;
    let admission = judge(&no_window, &config(&[]));
    assert_eq!(
        admission.fixes,
        ["ALTER TABLE `db`.`orders` MODIFY SETTING non_replicated_deduplication_window = 10000"]
    );
    assert!(!admission.admitted && admission.reasons[0].contains(&admission.fixes[0]));
    // At-least-once needs no token.
    assert!(judge(&no_window, &config(&[("delivery", "at_least_once")])).admitted);

    let no_offsets = facts("MergeTree", &[("id", "Int64")]);
    assert!(judge(&no_offsets, &config(&[])).reasons[0].contains("_partition and _offset"));
    let token = judge(&no_offsets, &config(&[("delivery", "token_only")]));
    assert_eq!((token.admitted, token.guarantee), (true, Guarantee::TokenOnly));
}

#[test]
fn engines_that_lose_rows_are_refused_only_for_exactly_once() {
    for engine in
        ["ReplacingMergeTree", "CollapsingMergeTree", "SummingMergeTree", "ReplicatedAggregatingMergeTree"]
    {
        assert!(!judge(&facts(engine, WITH_OFFSETS), &config(&[])).admitted, "{engine}");
        assert!(judge(&facts(engine, WITH_OFFSETS), &config(&[("delivery", "token_only")])).admitted);
    }
    for engine in ["Distributed", "Memory", "Log", "Null"] {
        assert!(!judge(&facts(engine, WITH_OFFSETS), &config(&[])).admitted, "{engine}");
        assert!(judge(&facts(engine, WITH_OFFSETS), &config(&[("delivery", "at_least_once")])).admitted);
    }
    assert!(!judge(&facts("View", WITH_OFFSETS), &config(&[("delivery", "at_least_once")])).admitted);
}

#[test]
fn views_need_windows_and_a_replicated_source() {
    let view = |window| ViewFacts {
        name: "v".into(),
        target: Some(TargetFacts {
            name: "t".into(),
            deduplication_window: window,
            fix: Some("ALTER t".into()),
        }),
    };
    let mut plain = facts("MergeTree", WITH_OFFSETS);
    plain.views = vec![view(100)];
    let refused = judge(&plain, &config(&[]));
    assert!(refused.reasons[0].contains("plain MergeTree"), "{:?}", refused.reasons);
    let warned = judge(&plain, &config(&[("views", "warn")]));
    assert_eq!((warned.admitted, warned.guarantee), (true, Guarantee::ExactlyOnceTableOnly));
    assert!(judge(&plain, &config(&[("delivery", "token_only")])).admitted);

    let mut replicated = facts("ReplicatedMergeTree", WITH_OFFSETS);
    replicated.views = vec![view(100)];
    assert!(judge(&replicated, &config(&[])).admitted);
    replicated.views.push(view(0));
    let refused = judge(&replicated, &config(&[]));
    assert_eq!((refused.admitted, refused.fixes), (false, vec!["ALTER t".to_owned()]));
}

#[test]
fn types_the_encoder_lacks_can_be_left_to_the_server() {
    let mut columns = WITH_OFFSETS.to_vec();
    columns.push(("doc", "JSON"));
    let table = facts("MergeTree", &columns);
    assert!(judge(&table, &config(&[])).reasons[0].contains("column doc"));
    let left_out = judge(&table, &config(&[("server.default.columns", "doc")]));
    assert!(left_out.admitted, "{:?}", left_out.reasons);
}

#[test]
fn creation_from_columns_or_samples() {
    let refused = plan_creation("db", &config(&[]), &[]);
    assert!(refused.reasons[0].contains("does not exist"));
    let given = plan_creation("db", &config(&[("auto.create", "true"), ("columns", "id Int64")]), &[]);
    assert!(given.admitted, "{:?}", given.reasons);
    assert!(given.ddl.unwrap().contains("non_replicated_deduplication_window"));
    let empty = plan_creation("db", &config(&[("auto.create", "true")]), &[]);
    assert!(empty.admitted && empty.waits_for_record && empty.ddl.is_none());
    assert!(empty.warnings.iter().any(|w| w.contains("flumen.clickhouse.columns")), "{:?}", empty.warnings);
    let sampled = plan_creation("db", &config(&[("auto.create", "true")]), &[br#"{"id": 1}"#]);
    assert!(sampled.admitted && sampled.ddl.unwrap().contains("`id` Int64"));
}

#[test]
fn reads_the_servers_texts() {
    let full =
        "MergeTree ORDER BY id SETTINGS index_granularity = 8192, non_replicated_deduplication_window = 77";
    assert_eq!(engine_setting(full, "non_replicated_deduplication_window"), Some(77));
    assert_eq!(engine_setting(full, "replicated_deduplication_window"), None);
    let target = |text: &str| view_target(text);
    assert_eq!(
        target("CREATE MATERIALIZED VIEW db.v TO db.t (`a` Int8) AS SELECT a FROM db.s"),
        Some((Some("db".into()), "t".into()))
    );
    assert_eq!(
        target("CREATE MATERIALIZED VIEW v TO `a\\`b`.`c d` AS SELECT 1"),
        Some((Some("a`b".into()), "c d".into()))
    );
    assert_eq!(target("CREATE MATERIALIZED VIEW v (`a` Int8) ENGINE = MergeTree AS SELECT x TO y"), None);
}
