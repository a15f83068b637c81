use std::collections::BTreeMap;

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_configs_response::DescribeConfigsResourceResult;
use kafka_protocol::messages::{
    AlterConfigsRequest, DescribeConfigsRequest, DescribeConfigsResponse, IncrementalAlterConfigsRequest,
    alter_configs_request, incremental_alter_configs_request,
};

use super::testing::*;
use super::*;
use crate::broker_config::BrokerConfig;
use crate::broker_table::BROKER_CONFIGS;
use crate::config_def::{ConfigKind, ExtraConfig};
use crate::group_table::GROUP_CONFIGS;
use crate::topic_table::TOPIC_CONFIGS;

const TOPIC: i8 = 2;
const BROKER: i8 = 4;
const SET: i8 = 0;
const DELETE: i8 = 1;
const APPEND: i8 = 2;
const SUBTRACT: i8 = 3;

fn describing(resource_type: i8, name: &str, keys: Option<&[&str]>) -> DescribeConfigsRequest {
    let resource = DescribeConfigsResource::default()
        .with_resource_type(resource_type)
        .with_resource_name(s(name))
        .with_configuration_keys(keys.map(|keys| keys.iter().map(|key| s(key)).collect()));
    DescribeConfigsRequest::default().with_resources(vec![resource]).with_include_synonyms(true)
}

fn entry<'a>(response: &'a DescribeConfigsResponse, name: &str) -> &'a DescribeConfigsResourceResult {
    response.results[0].configs.iter().find(|entry| &*entry.name == name).unwrap()
}

fn synonyms(entry: &DescribeConfigsResourceResult) -> Vec<(String, String, i8)> {
    let value = |v: &Option<kafka_protocol::protocol::StrBytes>| v.as_deref().unwrap_or("null").to_string();
    entry.synonyms.iter().map(|s| (s.name.to_string(), value(&s.value), s.source)).collect()
}

fn incremental(
    resource_type: i8,
    name: &str,
    changes: &[(&str, i8, Option<&str>)],
) -> IncrementalAlterConfigsRequest {
    let configs = changes
        .iter()
        .map(|(name, operation, value)| {
            incremental_alter_configs_request::AlterableConfig::default()
                .with_name(s(name))
                .with_config_operation(*operation)
                .with_value(value.map(s))
        })
        .collect();
    let resource = incremental_alter_configs_request::AlterConfigsResource::default()
        .with_resource_type(resource_type)
        .with_resource_name(s(name))
        .with_configs(configs);
    IncrementalAlterConfigsRequest::default().with_resources(vec![resource])
}

fn replacing(resource_type: i8, name: &str, configs: &[(&str, Option<&str>)]) -> AlterConfigsRequest {
    let configs = configs
        .iter()
        .map(|(name, value)| {
            alter_configs_request::AlterableConfig::default().with_name(s(name)).with_value(value.map(s))
        })
        .collect();
    let resource = alter_configs_request::AlterConfigsResource::default()
        .with_resource_type(resource_type)
        .with_resource_name(s(name))
        .with_configs(configs);
    AlterConfigsRequest::default().with_resources(vec![resource])
}

#[test]
fn every_topic_config_is_described_in_every_version() {
    let image = image(&[("a", 1, 1)]);
    for version in 1..=4 {
        let mut request = describing(TOPIC, "a", None);
        request.include_documentation = version >= 3;
        let request = wire(&request, version);
        let response = wire(&describe_configs(&request, &image, &BrokerConfig::default()), version);
        assert_eq!(
            (response.results[0].error_code, response.results[0].configs.len()),
            (0, TOPIC_CONFIGS.len())
        );
        assert_eq!(response.results[0].error_message, None);
        let segment = entry(&response, "segment.bytes");
        assert_eq!((segment.value.as_deref(), segment.config_source), (Some("1073741824"), 5));
        assert_eq!(synonyms(segment), [("log.segment.bytes".into(), "1073741824".into(), 5)]);
        assert!(!segment.read_only && !segment.is_sensitive);
        if version >= 3 {
            assert_eq!(segment.config_type, 3);
            assert!(segment.documentation.as_deref().is_some_and(|doc| !doc.is_empty()));
        }
    }
}

#[test]
fn values_say_where_they_come_from() {
    let config = config(&[("log.retention.hours", "2"), ("min.insync.replicas", "1")]);
    let mut image = image(&[("a", 1, 1)]).with_static_configs(&config);
    let described = |image: &crate::MetadataImage| {
        let response = describe_configs(&describing(TOPIC, "a", Some(&["retention.ms"])), image, &config);
        assert_eq!(response.results[0].configs.len(), 1);
        let entry = entry(&response, "retention.ms");
        let value = entry.value.as_deref().unwrap().to_string();
        assert_eq!(value, image.topics["a"].effective.retention_ms.to_string());
        (value, entry.config_source, synonyms(entry))
    };
    let fixed = ("log.retention.hours".to_string(), "2".to_string(), 4);
    let default = ("log.retention.hours".to_string(), "168".to_string(), 5);
    assert_eq!(described(&image), ("7200000".into(), 4, vec![fixed.clone()]));

    let plan = incremental_alter_configs(
        &incremental(BROKER, "", &[("log.retention.ms", SET, Some("77"))]),
        &image,
        &config,
    );
    commit(&mut image, &plan);
    let cluster = ("log.retention.ms".to_string(), "77".to_string(), 3);
    assert_eq!(described(&image), ("77".into(), 3, vec![cluster.clone(), fixed.clone(), default.clone()]));

    let plan = incremental_alter_configs(
        &incremental(BROKER, "1", &[("log.retention.ms", SET, Some("66"))]),
        &image,
        &config,
    );
    commit(&mut image, &plan);
    let node = ("log.retention.ms".to_string(), "66".to_string(), 2);
    let plan = incremental_alter_configs(
        &incremental(TOPIC, "a", &[("retention.ms", SET, Some("5"))]),
        &image,
        &config,
    );
    assert_eq!(described(&image).1, 2);
    commit(&mut image, &plan);
    let own = ("retention.ms".to_string(), "5".to_string(), 1);
    assert_eq!(described(&image), ("5".into(), 1, vec![own, node, cluster, fixed, default]));
}

#[test]
fn the_broker_is_described_without_its_secrets() {
    let config = config(&[("clickhouse.password", "hunter2"), ("num.partitions", "3")]);
    let mut image = image(&[]);
    for version in 1..=4 {
        let request = wire(&describing(BROKER, "1", None), version);
        let response = wire(&describe_configs(&request, &image, &config), version);
        assert_eq!(response.results[0].configs.len(), BROKER_CONFIGS.len());
        let password = entry(&response, "clickhouse.password");
        assert_eq!((password.value.as_ref(), password.is_sensitive, password.config_source), (None, true, 4));
        assert_eq!(synonyms(password), [("clickhouse.password".into(), "null".into(), 4)]);
        let partitions = entry(&response, "num.partitions");
        assert_eq!((partitions.value.as_deref(), partitions.config_source), (Some("3"), 4));
        let retention = entry(&response, "log.retention.ms");
        assert_eq!((retention.value.as_deref(), retention.config_source), (None, 5));
        assert!(entry(&response, "node.id").read_only && !retention.read_only);
    }
    let no_keys = describe_configs(&describing(BROKER, "1", Some(&[])), &image, &config);
    assert_eq!(no_keys.results[0].configs.len(), BROKER_CONFIGS.len(), "no keys are all keys");
    let empty = describe_configs(&describing(BROKER, "", None), &image, &config);
    assert_eq!((empty.results[0].error_code, empty.results[0].configs.len()), (0, 0));
    let set = incremental(BROKER, "", &[("num.partitions", SET, Some("9"))]);
    let plan = incremental_alter_configs(&set, &image, &config);
    commit(&mut image, &plan);
    let changed = describe_configs(&describing(BROKER, "", None), &image, &config);
    assert_eq!(entry(&changed, "num.partitions").config_source, 3);
    assert_eq!(config.with_dynamic(&image).num_partitions, 9);
    assert_eq!(config.with_dynamic(&image).clickhouse_password, config.clickhouse_password);
}

#[test]
fn broker_configs_that_are_not_known_are_kept_and_not_shown() {
    let config = config(&[]);
    let mut image = image(&[]);
    let set = incremental(BROKER, "1", &[("sasl.kerberos.min.time.before.relogin", SET, Some("58000"))]);
    let plan = incremental_alter_configs(&set, &image, &config);
    assert_eq!(plan.response.responses[0].error_code, 0);
    commit(&mut image, &plan);
    let described = describe_configs(&describing(BROKER, "1", None), &image, &config);
    let unknown = entry(&described, "sasl.kerberos.min.time.before.relogin");
    assert_eq!((unknown.value.as_ref(), unknown.is_sensitive, unknown.config_source), (None, true, 2));
    assert!(described.results[0].configs.is_sorted_by(|a, b| a.name < b.name));
    assert!(!config.with_dynamic(&image).values.contains_key("sasl.kerberos.min.time.before.relogin"));
    // A letter missing is a mistake, not a plugin.
    let set = incremental(BROKER, "1", &[("num.partition", SET, Some("3"))]);
    let refused = incremental_alter_configs(&set, &image, &config);
    assert_eq!(refused.response.responses[0].error_code, 40);
    assert!(refused.response.responses[0].error_message.as_ref().unwrap().contains("num.partitions"));
    let delete = incremental(BROKER, "1", &[("sasl.kerberos.min.time.before.relogin", DELETE, None)]);
    let plan = incremental_alter_configs(&delete, &image, &config);
    commit(&mut image, &plan);
    assert!(image.node_configs.is_empty());
}

#[test]
fn groups_have_configurations() {
    const GROUP: i8 = 32;
    let config = config(&[]);
    let mut image = image(&[]);
    let name = "consumer.session.timeout.ms";
    let default = ("group.consumer.session.timeout.ms".to_string(), "45000".to_string(), 5);
    for version in 1..=4 {
        let request = wire(&describing(GROUP, "g", None), version);
        let response = wire(&describe_configs(&request, &image, &config), version);
        assert_eq!(response.results[0].configs.len(), GROUP_CONFIGS.len());
        let found = entry(&response, name);
        assert_eq!((found.value.as_deref(), found.config_source), (Some("45000"), 5));
        assert_eq!(synonyms(found), [default.clone()]);
    }
    let set = incremental(
        GROUP,
        "g",
        &[(name, SET, Some("50000")), ("share.auto.offset.reset", SET, Some("earliest"))],
    );
    let plan = incremental_alter_configs(&set, &image, &config);
    commit(&mut image, &plan);
    let described = describe_configs(&describing(GROUP, "g", Some(&[name])), &image, &config);
    assert_eq!(described.results[0].configs.len(), 1);
    assert_eq!(entry(&described, name).config_source, 8);
    assert_eq!(synonyms(entry(&described, name)), [(name.into(), "50000".into(), 8), default]);
    let other = describe_configs(&describing(GROUP, "h", Some(&[name])), &image, &config);
    assert_eq!(entry(&other, name).value.as_deref(), Some("45000"));

    for (group, name, value, code) in
        [("", name, "50000", 42), ("g", "foo", "1", 40), ("g", name, "1", 40), ("g", name, "many", 40)]
    {
        let set = incremental(GROUP, group, &[(name, SET, Some(value))]);
        let refused = incremental_alter_configs(&set, &image, &config);
        assert_eq!(
            (refused.response.responses[0].error_code, refused.commands.len()),
            (code, 0),
            "{name}={value}"
        );
    }
    let plan = alter_configs(&replacing(GROUP, "g", &[]), &image, &config);
    image.apply(&plan.commands[0]).unwrap();
    assert!(image.group_configs.is_empty());
}

#[test]
fn what_cannot_be_described_says_why() {
    const BROKER_LOGGER: i8 = 8;
    const CLIENT_METRICS: i8 = 16;
    let image = image(&[("a", 1, 1)]);
    for (resource_type, name, code) in [
        (TOPIC, "nope", 3),
        (TOPIC, "x y", 17),
        (BROKER, "2", 42),
        (BROKER, "x", 42),
        (BROKER_LOGGER, "2", 42),
        (CLIENT_METRICS, "", 42),
        (99, "", 42),
    ] {
        let response =
            describe_configs(&describing(resource_type, name, None), &image, &BrokerConfig::default());
        assert_eq!(response.results[0].error_code, code, "{resource_type} {name}");
        assert!(response.results[0].error_message.is_some() && response.results[0].configs.is_empty());
    }
    let config = BrokerConfig::default();
    let loggers = describe_configs(&describing(BROKER_LOGGER, "1", None), &image, &config);
    assert!(loggers.results[0].error_code == 0 && loggers.results[0].configs.is_empty());
    let metrics = describe_configs(&describing(CLIENT_METRICS, "any", None), &image, &config);
    assert_eq!(entry(&metrics, "interval.ms").value.as_deref(), Some("300000"));
    let none =
        describe_configs(&describing(TOPIC, "a", Some(&["no.such"])), &image, &BrokerConfig::default());
    assert!(none.results[0].error_code == 0 && none.results[0].configs.is_empty());
}

/// The overrides of topic `a` after the changes, or the code.
fn after(
    start: &[(&str, &str)],
    changes: &[(&str, i8, Option<&str>)],
) -> Result<BTreeMap<String, String>, i16> {
    let config = BrokerConfig::default();
    let mut image = image(&[("a", 1, 1)]);
    let set = start.iter().map(|(k, v)| (k.to_string(), Some(v.to_string()))).collect();
    let topic_id = image.topics["a"].id;
    image.apply(&crate::Command::SetTopicConfigs { topic_id, set }).unwrap();
    let mut outcome = Ok(BTreeMap::new());
    for version in 0..=1 {
        let request = wire(&incremental(TOPIC, "a", changes), version);
        let mut image = image.clone();
        let plan = incremental_alter_configs(&request, &image, &config);
        let response = wire(&plan.response, version);
        let code = response.responses[0].error_code;
        assert_eq!(response.responses[0].error_message.is_none(), code == 0);
        commit(&mut image, &plan);
        outcome = if code == 0 { Ok(image.topics["a"].configs.clone()) } else { Err(code) };
        assert!(code == 0 || plan.commands.is_empty());
    }
    outcome
}

#[test]
fn incremental_operations() {
    assert_eq!(after(&[], &[("retention.ms", SET, Some("5"))]), Ok(map(&[("retention.ms", "5")])));
    assert_eq!(after(&[("retention.ms", "5")], &[("retention.ms", DELETE, None)]), Ok(map(&[])));
    assert_eq!(after(&[], &[("retention.ms", DELETE, None), ("nope", DELETE, None)]), Ok(map(&[])));
    // Lists start from what holds, which is the default here.
    assert_eq!(
        after(&[], &[("cleanup.policy", APPEND, Some("compact"))]),
        Ok(map(&[("cleanup.policy", "delete,compact")]))
    );
    assert_eq!(
        after(&[("cleanup.policy", "delete,compact")], &[("cleanup.policy", SUBTRACT, Some("delete"))]),
        Ok(map(&[("cleanup.policy", "compact")]))
    );
    assert_eq!(
        after(&[("cleanup.policy", "compact")], &[("cleanup.policy", APPEND, Some("compact"))]),
        Ok(map(&[("cleanup.policy", "compact")]))
    );
    assert_eq!(
        after(&[], &[("cleanup.policy", SUBTRACT, Some("delete"))]),
        Ok(map(&[("cleanup.policy", "")])),
        "neither deleted nor compacted: kept for ever"
    );
    assert_eq!(after(&[], &[("cleanup.policy", SET, Some("compact,shred"))]), Err(40));
    assert_eq!(
        after(&[], &[("leader.replication.throttled.replicas", SET, Some("0:1,1:1"))]),
        Ok(map(&[("leader.replication.throttled.replicas", "0:1,1:1")]))
    );
    assert_eq!(after(&[], &[("retention.ms", APPEND, Some("5"))]), Err(40));
    assert_eq!(after(&[], &[("nope", APPEND, Some("5"))]), Err(40));
    assert_eq!(after(&[], &[("nope", SET, Some("5"))]), Err(40));
    assert_eq!(after(&[], &[("retention.ms", SET, Some("x"))]), Err(40));
    assert_eq!(after(&[], &[("retention.ms", SET, None)]), Err(42));
    assert_eq!(after(&[], &[("retention.ms", 9, Some("5"))]), Err(42));
    assert_eq!(after(&[], &[("retention.ms", SET, Some("5")), ("retention.ms", SET, Some("6"))]), Err(42));
    assert_eq!(after(&[], &[("message.format.version", SET, Some("2.8"))]), Ok(map(&[])));
    assert_eq!(
        after(&[("max.compaction.lag.ms", "5")], &[("min.compaction.lag.ms", SET, Some("6"))]),
        Err(40)
    );
}

#[test]
fn changes_that_change_nothing_and_dry_runs_need_no_command() {
    let config = BrokerConfig::default();
    let mut image = image(&[("a", 1, 1)]);
    let request = incremental(TOPIC, "a", &[("retention.ms", SET, Some("5"))]);
    let dry = incremental_alter_configs(&request.clone().with_validate_only(true), &image, &config);
    assert_eq!((dry.response.responses[0].error_code, dry.commands.len()), (0, 0));
    let plan = incremental_alter_configs(&request, &image, &config);
    commit(&mut image, &plan);
    assert!(incremental_alter_configs(&request, &image, &config).commands.is_empty());
    let mut failed = plan;
    failed.response.fail(ErrorCode::REQUEST_TIMED_OUT);
    assert_eq!(failed.response.responses[0].error_code, 7);
}

#[test]
fn alter_configs_replaces() {
    let config = BrokerConfig::default();
    for version in 0..=2 {
        let mut image = image(&[("a", 1, 1)]);
        let first = replacing(TOPIC, "a", &[("retention.ms", Some("5")), ("segment.ms", Some("6"))]);
        let plan = alter_configs(&wire(&first, version), &image, &config);
        assert_eq!(wire(&plan.response, version).responses[0].error_code, 0);
        commit(&mut image, &plan);
        let plan = alter_configs(&replacing(TOPIC, "a", &[("retention.ms", Some("7"))]), &image, &config);
        commit(&mut image, &plan);
        assert_eq!(image.topics["a"].configs, map(&[("retention.ms", "7")]));
        for (configs, code) in [(("nope", Some("1")), 40), (("retention.ms", None), 42)] {
            let plan = alter_configs(&replacing(TOPIC, "a", &[configs]), &image, &config);
            assert_eq!(
                (wire(&plan.response, version).responses[0].error_code, plan.commands.len()),
                (code, 0)
            );
        }
        let mut plan = alter_configs(&replacing(TOPIC, "a", &[]), &image, &config);
        commit(&mut image, &plan);
        assert!(image.topics["a"].configs.is_empty());
        plan.response.fail(ErrorCode::NOT_CONTROLLER);
        assert_eq!(plan.response.responses[0].error_code, 41);
    }
}

#[test]
fn resources_that_cannot_be_altered_say_why() {
    let config = BrokerConfig::default();
    let image = image(&[("a", 1, 1)]);
    for (resource_type, resource, key, value, code) in [
        (TOPIC, "nope", "retention.ms", "5", 3),
        (TOPIC, "", "retention.ms", "5", 42),
        (BROKER, "2", "num.partitions", "5", 42),
        (BROKER, "1", "node.id", "5", 42),
        (BROKER, "", "clickhouse.password", "x", 42),
        (BROKER, "1", "num.partitons", "5", 40),
        (BROKER, "1", "retention.ms", "5", 40),
        (BROKER, "1", "num.partitions", "0", 42),
        (TOPIC, "no name!", "retention.ms", "5", 17),
        (BROKER, "", "log.cleaner.max.compaction.lag.ms", "0", 42),
        (8, "1", "x", "INFO", 42),
    ] {
        let request = incremental(resource_type, resource, &[(key, SET, Some(value))]);
        let plan = incremental_alter_configs(&request, &image, &config);
        assert_eq!(plan.response.responses[0].error_code, code, "{resource_type} {resource} {key}");
        assert!(plan.commands.is_empty());
    }
    let conflict = incremental(
        BROKER,
        "",
        &[
            ("log.cleaner.max.compaction.lag.ms", SET, Some("5")),
            ("log.cleaner.min.compaction.lag.ms", SET, Some("6")),
        ],
    );
    let plan = incremental_alter_configs(&conflict, &image, &config);
    assert_eq!(plan.response.responses[0].error_code, 40);
    let mut twice = incremental(TOPIC, "a", &[("retention.ms", SET, Some("5"))]);
    twice.resources.push(twice.resources[0].clone());
    let plan = incremental_alter_configs(&twice, &image, &config);
    assert!(plan.response.responses.iter().all(|r| r.error_code == 42) && plan.commands.is_empty());
}

fn only_true_or_false(name: &str, value: &str) -> Result<(), String> {
    assert_eq!(name, "flumen.clickhouse.enable");
    if value == "true" || value == "false" { Ok(()) } else { Err("must be true or false".into()) }
}

fn accept(_: &str, _: &str) -> Result<(), String> {
    Ok(())
}

const EXTRAS: &[ExtraConfig] = &[
    ExtraConfig {
        name: "flumen.clickhouse.enable",
        default: "false",
        kind: ConfigKind::Boolean,
        doc: "Whether the topic is exported.",
        validate: only_true_or_false,
    },
    ExtraConfig {
        name: "flumen.clickhouse.table",
        default: "",
        kind: ConfigKind::String,
        doc: "Table.",
        validate: accept,
    },
];

fn needs_a_table(overrides: &BTreeMap<String, String>) -> Result<(), String> {
    let on = overrides.get("flumen.clickhouse.enable").is_some_and(|v| v == "true");
    if on && !overrides.contains_key("flumen.clickhouse.table") { Err("no table".into()) } else { Ok(()) }
}

#[test]
fn configs_of_other_parts_are_served_like_kafkas_own() {
    let config = BrokerConfig::default().with_topic_extras(EXTRAS).with_topic_check(needs_a_table);
    let mut image = image(&[("a", 1, 1)]);
    let response = describe_configs(&describing(TOPIC, "a", None), &image, &config);
    let names: Vec<&str> = response.results[0].configs.iter().map(|c| c.name.as_str()).collect();
    assert!(names.is_sorted() && names.len() == TOPIC_CONFIGS.len() + 2);
    let enable = entry(&response, "flumen.clickhouse.enable");
    assert_eq!((enable.value.as_deref(), enable.config_type, enable.config_source), (Some("false"), 1, 5));
    assert_eq!(entry(&response, "flumen.clickhouse.table").value, None);
    let alter = |image: &crate::MetadataImage, changes: &[(&str, i8, Option<&str>)]| {
        incremental_alter_configs(&incremental(TOPIC, "a", changes), image, &config)
    };
    let plan = alter(&image, &[("flumen.clickhouse.enable", SET, Some("true"))]);
    let refused = &plan.response.responses[0];
    assert_eq!((refused.error_code, refused.error_message.as_deref()), (40, Some("no table")));
    let plan = alter(&image, &[("flumen.clickhouse.enabel", SET, Some("true"))]);
    let message = plan.response.responses[0].error_message.clone().unwrap();
    assert!(message.contains("did you mean 'flumen.clickhouse.enable'"), "{message}");
    assert_eq!(
        alter(&image, &[("flumen.clickhouse.enable", SET, Some("yes"))]).response.responses[0].error_code,
        40
    );
    let both = [("flumen.clickhouse.enable", SET, Some("TRUE")), ("flumen.clickhouse.table", SET, Some("t"))];
    let plan = alter(&image, &both);
    commit(&mut image, &plan);
    assert_eq!(image.topics["a"].configs["flumen.clickhouse.enable"], "true");
    let changes = BTreeMap::from([("flumen.clickhouse.table".to_string(), None)]);
    assert_eq!(
        plan_topic_configs(&image, &config, "a", &changes).unwrap_err().code,
        ErrorCode::INVALID_CONFIG
    );
    let changes = BTreeMap::from([("retention.ms".to_string(), Some("9".to_string()))]);
    for command in plan_topic_configs(&image, &config, "a", &changes).unwrap() {
        image.apply(&command).unwrap();
    }
    assert_eq!(image.topics["a"].effective.retention_ms, 9);
}
