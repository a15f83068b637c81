//! DescribeConfigs, AlterConfigs, IncrementalAlterConfigs.

use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::{
    AlterConfigsRequest, DescribeConfigsRequest, IncrementalAlterConfigsRequest, alter_configs_request,
    incremental_alter_configs_request,
};

use super::Probes;
use crate::wire::text;

const DESCRIBE: (i16, i16) = (1, 4);
const ALTER: (i16, i16) = (0, 2);
const INCREMENTAL: (i16, i16) = (0, 1);

const TOPIC: i8 = 2;
const BROKER: i8 = 4;
const BROKER_LOGGER: i8 = 8;
const CLIENT_METRICS: i8 = 16;
const GROUP: i8 = 32;

fn describe(resources: &[(i8, &str, Option<&[&str]>)]) -> DescribeConfigsRequest {
    let resources = resources
        .iter()
        .map(|(kind, name, keys)| {
            DescribeConfigsResource::default()
                .with_resource_type(*kind)
                .with_resource_name(text(name))
                .with_configuration_keys(keys.map(|keys| keys.iter().map(|k| text(k)).collect()))
        })
        .collect();
    DescribeConfigsRequest::default().with_resources(resources)
}

fn replace(resources: &[(i8, &str, &[(&str, Option<&str>)])]) -> AlterConfigsRequest {
    let resources = resources
        .iter()
        .map(|(kind, name, configs)| {
            let configs = configs
                .iter()
                .map(|(k, v)| {
                    alter_configs_request::AlterableConfig::default()
                        .with_name(text(k))
                        .with_value(v.map(text))
                })
                .collect();
            alter_configs_request::AlterConfigsResource::default()
                .with_resource_type(*kind)
                .with_resource_name(text(name))
                .with_configs(configs)
        })
        .collect();
    AlterConfigsRequest::default().with_validate_only(true).with_resources(resources)
}

type Change<'a> = (&'a str, i8, Option<&'a str>);

fn change(resources: &[(i8, &str, &[Change<'_>])]) -> IncrementalAlterConfigsRequest {
    let resources = resources
        .iter()
        .map(|(kind, name, configs)| {
            let configs = configs
                .iter()
                .map(|(k, operation, v)| {
                    incremental_alter_configs_request::AlterableConfig::default()
                        .with_name(text(k))
                        .with_config_operation(*operation)
                        .with_value(v.map(text))
                })
                .collect();
            incremental_alter_configs_request::AlterConfigsResource::default()
                .with_resource_type(*kind)
                .with_resource_name(text(name))
                .with_configs(configs)
        })
        .collect();
    IncrementalAlterConfigsRequest::default().with_validate_only(true).with_resources(resources)
}

/// DescribeConfigs with the entries of each resource in one order: Kafka gives them in none.
fn described(probes: &mut Probes, name: &str, build: impl Fn() -> DescribeConfigsRequest + 'static) {
    probes.exchange(&format!("DescribeConfigs/{name}"), DESCRIBE, move |bed, version| {
        let mut wire = bed.wire()?;
        wire.send(version, &build())?;
        let Some(mut answer) = wire.receive_or_closed::<DescribeConfigsRequest>(version)? else {
            return Ok("closed".into());
        };
        for result in &mut answer.results {
            result.configs.sort_by(|a, b| a.name.cmp(&b.name));
        }
        Ok(format!("{answer:#?}"))
    });
}

pub fn add(probes: &mut Probes) {
    let keys: Option<&[&str]> = Some(&["retention.ms", "max.message.bytes", "cleanup.policy"]);
    described(probes, "topic", move || describe(&[(TOPIC, "compacted", keys)]));
    described(probes, "synonyms", move || {
        describe(&[(TOPIC, "compacted", keys)]).with_include_synonyms(true)
    });
    probes.exchange("DescribeConfigs/documentation", (3, 4), move |bed, version| {
        let request = describe(&[(TOPIC, "compacted", keys)]).with_include_documentation(true);
        let answer = bed.wire()?.ask(version, &request)?;
        let documented = answer.results[0].configs.iter().all(|c| c.documentation.is_some());
        Ok(format!("documented: {documented}"))
    });
    probes.exchange("DescribeConfigs/all of a topic", DESCRIBE, |bed, version| {
        let answer = bed.wire()?.ask(version, &describe(&[(TOPIC, "compacted", None)]))?;
        let mut names: Vec<String> = answer.results[0]
            .configs
            .iter()
            .map(|c| format!("{} type {}", c.name.as_str(), if version >= 3 { c.config_type } else { 0 }))
            .filter(|name| !name.starts_with("flumen."))
            .collect();
        names.sort();
        Ok(names.join("\n"))
    });
    described(probes, "no keys", || describe(&[(TOPIC, "plain", Some(&[]))]));
    described(probes, "unknown keys", || describe(&[(TOPIC, "plain", Some(&["no.such"]))]));
    described(probes, "unknown topic", || describe(&[(TOPIC, "nowhere", None)]));
    described(probes, "bad topic name", || describe(&[(TOPIC, "no name!", None)]));
    described(probes, "empty topic name", || describe(&[(TOPIC, "", None)]));
    described(probes, "no resources", || describe(&[]));
    described(probes, "twice", move || {
        describe(&[(TOPIC, "plain", keys), (TOPIC, "plain", Some(&["retention.ms"]))])
    });
    described(probes, "broker", || describe(&[(BROKER, "1", Some(&["message.max.bytes"]))]));
    described(probes, "brokers by default", || describe(&[(BROKER, "", Some(&["message.max.bytes"]))]));
    for name in ["77", "x", "-1"] {
        described(probes, &format!("broker {name}"), move || describe(&[(BROKER, name, None)]));
    }
    described(probes, "group", || {
        describe(&[(GROUP, "g", Some(&["consumer.session.timeout.ms"]))]).with_include_synonyms(true)
    });
    described(probes, "empty group name", || describe(&[(GROUP, "", None)]));
    for kind in [0, 3, 99] {
        described(probes, &format!("resource type {kind}"), move || describe(&[(kind, "x", None)]));
    }
    described(probes, "client metrics", || describe(&[(CLIENT_METRICS, "cm", None)]));
    described(probes, "client metrics without a name", || describe(&[(CLIENT_METRICS, "", None)]));
    described(probes, "loggers of another broker", || describe(&[(BROKER_LOGGER, "77", None)]));

    for (what, kind, name, key, value) in [
        ("good", TOPIC, "plain", "retention.ms", Some("5000")),
        ("not a number", TOPIC, "plain", "retention.ms", Some("soon")),
        ("out of range", TOPIC, "plain", "segment.bytes", Some("10")),
        ("null", TOPIC, "plain", "retention.ms", None),
        ("unknown", TOPIC, "plain", "no.such.config", Some("1")),
        ("removed", TOPIC, "plain", "message.format.version", Some("2.0")),
        ("unknown topic", TOPIC, "nowhere", "retention.ms", Some("5000")),
        ("bad topic name", TOPIC, "no name!", "retention.ms", Some("5000")),
        ("empty topic name", TOPIC, "", "retention.ms", Some("5000")),
        ("broker", BROKER, "1", "message.max.bytes", Some("5000000")),
        ("broker by default", BROKER, "", "message.max.bytes", Some("5000000")),
        ("broker read-only", BROKER, "1", "node.id", Some("5")),
        ("broker unknown", BROKER, "1", "some.plugin.setting", Some("5")),
        ("broker not a number", BROKER, "1", "message.max.bytes", Some("much")),
        ("other broker", BROKER, "77", "message.max.bytes", Some("5000000")),
        ("broker that is no number", BROKER, "x", "message.max.bytes", Some("5000000")),
        ("group", GROUP, "g", "consumer.session.timeout.ms", Some("50000")),
        ("group out of range", GROUP, "g", "consumer.session.timeout.ms", Some("1")),
        ("group unknown", GROUP, "g", "no.such.config", Some("1")),
        ("empty group name", GROUP, "", "consumer.session.timeout.ms", Some("50000")),
        ("resource type 0", 0, "x", "retention.ms", Some("1")),
        ("resource type 99", 99, "x", "retention.ms", Some("1")),
    ] {
        probes.one(&format!("AlterConfigs/{what}"), ALTER, move |_, _| {
            replace(&[(kind, name, &[(key, value)])])
        });
        probes.one(&format!("IncrementalAlterConfigs/{what}"), INCREMENTAL, move |_, _| {
            change(&[(kind, name, &[(key, 0, value)])])
        });
    }
    probes.one("AlterConfigs/no resources", ALTER, |_, _| replace(&[]));
    probes.one("AlterConfigs/resource twice", ALTER, |_, _| {
        let set: &[(&str, Option<&str>)] = &[("retention.ms", Some("1"))];
        replace(&[(TOPIC, "plain", set), (TOPIC, "plain", set)])
    });
    probes.one("AlterConfigs/key twice", ALTER, |_, _| {
        replace(&[(TOPIC, "plain", &[("retention.ms", Some("1")), ("retention.ms", Some("2"))])])
    });
    probes.one("AlterConfigs/nothing", ALTER, |_, _| replace(&[(TOPIC, "plain", &[])]));
    probes.one("IncrementalAlterConfigs/no resources", INCREMENTAL, |_, _| change(&[]));
    probes.one("IncrementalAlterConfigs/resource twice", INCREMENTAL, |_, _| {
        let set: &[Change<'_>] = &[("retention.ms", 0, Some("1"))];
        change(&[(TOPIC, "plain", set), (TOPIC, "plain", set)])
    });
    probes.one("IncrementalAlterConfigs/key twice", INCREMENTAL, |_, _| {
        change(&[(TOPIC, "plain", &[("retention.ms", 0, Some("1")), ("retention.ms", 1, None)])])
    });
    for (what, key, operation, value) in [
        ("delete", "retention.ms", 1, None),
        ("delete with a value", "retention.ms", 1, Some("5")),
        ("delete unknown", "no.such.config", 1, None),
        ("append", "cleanup.policy", 2, Some("compact")),
        ("append what is there", "cleanup.policy", 2, Some("delete")),
        ("append nonsense", "cleanup.policy", 2, Some("shred")),
        ("append to a number", "retention.ms", 2, Some("1")),
        ("append null", "cleanup.policy", 2, None),
        ("append to unknown", "no.such.config", 2, Some("1")),
        ("subtract", "cleanup.policy", 3, Some("delete")),
        ("subtract what is not there", "cleanup.policy", 3, Some("compact")),
        ("subtract from a number", "retention.ms", 3, Some("1")),
        ("operation 4", "retention.ms", 4, Some("1")),
        ("operation -1", "retention.ms", -1, Some("1")),
    ] {
        probes.one(&format!("IncrementalAlterConfigs/{what}"), INCREMENTAL, move |_, _| {
            change(&[(TOPIC, "plain", &[(key, operation, value)])])
        });
    }
    probes.one("IncrementalAlterConfigs/good and bad together", INCREMENTAL, |_, _| {
        change(&[
            (TOPIC, "plain", &[("retention.ms", 0, Some("1"))]),
            (TOPIC, "empty", &[("retention.ms", 0, Some("soon"))]),
            (TOPIC, "nowhere", &[("retention.ms", 0, Some("1"))]),
        ])
    });
}
