//! DescribeConfigs: every configuration of a topic or the broker, with where its value comes from.

use std::collections::{BTreeMap, BTreeSet};

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_configs_response::{
    DescribeConfigsResourceResult, DescribeConfigsResult, DescribeConfigsSynonym,
};
use kafka_protocol::messages::{DescribeConfigsRequest, DescribeConfigsResponse};

use super::{Refused, text};
use crate::broker_config::BrokerConfig;
use crate::broker_table::{BROKER_CONFIGS, BrokerConfigDef, broker_def, synonyms};
use crate::config_def::{ConfigDef, ConfigKind, ConfigSource, Layers};
use crate::group_table::GROUP_CONFIGS;
use crate::image::MetadataImage;
use crate::topic_config::broker_level;
use crate::topic_table::{Synonym, TOPIC_CONFIGS};

pub(super) const RESOURCE_TOPIC: i8 = 2;
pub(super) const RESOURCE_BROKER: i8 = 4;
pub(super) const RESOURCE_BROKER_LOGGER: i8 = 8;
pub(super) const RESOURCE_CLIENT_METRICS: i8 = 16;
pub(super) const RESOURCE_GROUP: i8 = 32;

/// One configuration with everything that is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescribedConfig {
    pub name: String,
    /// `None`: not set, or a secret.
    pub value: Option<String>,
    pub source: ConfigSource,
    pub read_only: bool,
    pub sensitive: bool,
    pub kind: ConfigKind,
    pub documentation: String,
    /// Every place that gives a value, the one that counts first.
    pub synonyms: Vec<ConfigSynonym>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSynonym {
    pub name: String,
    pub value: Option<String>,
    pub source: ConfigSource,
}

pub fn describe_configs(
    request: &DescribeConfigsRequest,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> DescribeConfigsResponse {
    let results = request
        .resources
        .iter()
        .map(|resource| {
            let result = DescribeConfigsResult::default()
                .with_error_message(None)
                .with_resource_type(resource.resource_type)
                .with_resource_name(resource.resource_name.clone());
            match describe(resource, image, config) {
                Ok(found) => result.with_configs(on_wire(resource, found, request)),
                Err(refused) => result.with_error_code(refused.code.0).with_error_message(refused.text()),
            }
        })
        .collect();
    DescribeConfigsResponse::default().with_results(results)
}

fn describe(
    resource: &DescribeConfigsResource,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Result<Vec<DescribedConfig>, Refused> {
    let name = resource.resource_name.as_str();
    match resource.resource_type {
        RESOURCE_TOPIC => {
            crate::topic_name::check(name)
                .map_err(|reason| Refused::new(ErrorCode::INVALID_TOPIC_EXCEPTION, reason))?;
            let topic = image.topics.get(name).ok_or_else(|| {
                Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, format!("Topic '{name}' does not exist."))
            })?;
            Ok(topic_configs(&topic.configs, image, config))
        }
        RESOURCE_BROKER if name.is_empty() => Ok(cluster_defaults(image)),
        // Each broker knows its own configuration file: clients ask the one that they mean.
        RESOURCE_BROKER => {
            check_own_name(name, image)?;
            Ok(broker_configs(image, config))
        }
        RESOURCE_GROUP => {
            check_group_name(name)?;
            Ok(group_configs(name, image))
        }
        // There is no logger whose level could be asked for or changed by name.
        RESOURCE_BROKER_LOGGER => check_own_name(name, image).map(|()| Vec::new()),
        RESOURCE_CLIENT_METRICS if name.is_empty() => Err(Refused::new(
            ErrorCode::INVALID_REQUEST,
            "Client metrics subscription name must not be empty",
        )),
        RESOURCE_CLIENT_METRICS => Ok(client_metrics_defaults()),
        other => Err(unsupported_resource(other)),
    }
}

/// What a subscription of client metrics would be by default; none can be made, as none would be sent.
fn client_metrics_defaults() -> Vec<DescribedConfig> {
    [
        ("interval.ms", "300000", ConfigKind::Int, "How often (ms) a client would send its metrics."),
        ("match", "", ConfigKind::List, "Which clients would send them."),
        ("metrics", "", ConfigKind::List, "Prefixes of the names of the metrics that they would send."),
    ]
    .map(|(name, value, kind, documentation)| DescribedConfig {
        name: name.to_string(),
        value: Some(value.to_string()),
        source: ConfigSource::Default,
        read_only: false,
        sensitive: false,
        kind,
        documentation: documentation.to_string(),
        synonyms: Vec::new(),
    })
    .into()
}

pub(super) fn check_group_name(name: &str) -> Result<(), Refused> {
    if name.is_empty() {
        return Err(Refused::new(ErrorCode::INVALID_REQUEST, "Group name must not be empty"));
    }
    Ok(())
}

fn check_own_name(name: &str, image: &MetadataImage) -> Result<(), Refused> {
    if name.parse() == Ok(image.node.id) {
        return Ok(());
    }
    Err(unexpected_broker(name, image))
}

/// Any broker of the cluster: what is altered is kept by the metadata, whoever was asked.
pub(super) fn known_broker(name: &str, image: &MetadataImage) -> Result<i32, Refused> {
    let id = name.parse().ok().filter(|id| image.broker(*id).is_some());
    id.ok_or_else(|| unexpected_broker(name, image))
}

fn unexpected_broker(name: &str, image: &MetadataImage) -> Refused {
    let message = format!("Unexpected broker id, expected {}, but received {name}", image.node.id);
    Refused::new(ErrorCode::INVALID_REQUEST, message)
}

pub(super) fn unsupported_resource(resource_type: i8) -> Refused {
    let message =
        format!("Resource type {resource_type} is not served; topics (2), brokers (4) and groups (32) are.");
    Refused::new(ErrorCode::INVALID_REQUEST, message)
}

fn on_wire(
    resource: &DescribeConfigsResource,
    found: Vec<DescribedConfig>,
    request: &DescribeConfigsRequest,
) -> Vec<DescribeConfigsResourceResult> {
    // An empty list asks for all, like none.
    let wanted: Option<BTreeSet<&str>> = resource
        .configuration_keys
        .as_ref()
        .filter(|keys| !keys.is_empty())
        .map(|keys| keys.iter().map(|key| key.as_str()).collect());
    found
        .into_iter()
        .filter(|entry| wanted.as_ref().is_none_or(|wanted| wanted.contains(entry.name.as_str())))
        .map(|entry| {
            let synonyms = if request.include_synonyms { entry.synonyms } else { Vec::new() };
            DescribeConfigsResourceResult::default()
                .with_name(text(&entry.name))
                .with_value(entry.value.as_deref().map(text))
                .with_read_only(entry.read_only)
                .with_config_source(entry.source as i8)
                .with_is_sensitive(entry.sensitive)
                .with_config_type(entry.kind as i8)
                .with_documentation(request.include_documentation.then(|| text(&entry.documentation)))
                .with_synonyms(
                    synonyms
                        .into_iter()
                        .map(|synonym| {
                            DescribeConfigsSynonym::default()
                                .with_name(text(&synonym.name))
                                .with_value(synonym.value.as_deref().map(text))
                                .with_source(synonym.source as i8)
                        })
                        .collect(),
                )
        })
        .collect()
}

/// Every configuration of a topic with these overrides, sorted by name.
pub fn topic_configs(
    overrides: &BTreeMap<String, String>,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Vec<DescribedConfig> {
    // The configuration handed in, not the image's copy: the answer is right even if nobody installed that one.
    let layers = Layers { fixed: &config.values, ..image.layers() };
    let mut all: Vec<DescribedConfig> = TOPIC_CONFIGS
        .iter()
        .map(|row| {
            let inherited = broker_level(row, &layers).map(|(_, _, value)| value);
            topic_entry(&row.def, overrides, inherited, topic_synonyms(row.synonyms, &layers))
        })
        .collect();
    for extra in config.topic_extras {
        all.push(topic_entry(&extra.def(), overrides, None, Vec::new()));
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn topic_entry(
    def: &ConfigDef,
    overrides: &BTreeMap<String, String>,
    inherited: Option<String>,
    mut synonyms: Vec<ConfigSynonym>,
) -> DescribedConfig {
    let own = overrides.get(def.name);
    let value = own.cloned().or(inherited).or_else(|| def.default.map(str::to_string));
    let value = if def.is_sensitive() { None } else { value };
    if own.is_some() {
        let first =
            ConfigSynonym { name: def.name.to_string(), value: value.clone(), source: ConfigSource::Topic };
        synonyms.insert(0, first);
    }
    let source = synonyms.first().map_or(ConfigSource::Default, |synonym| synonym.source);
    DescribedConfig {
        name: def.name.to_string(),
        value,
        source,
        read_only: false,
        sensitive: def.is_sensitive(),
        kind: def.kind,
        documentation: def.documentation(),
        synonyms,
    }
}

fn topic_synonyms(names: &[Synonym], layers: &Layers<'_>) -> Vec<ConfigSynonym> {
    let names: Vec<&'static str> = names.iter().map(|(name, _)| *name).collect();
    let mut found = given(&names, layers);
    // Kafka names the default of another unit only below a value of the unit that counts first.
    if !found.iter().any(|synonym| names.first() == Some(&synonym.name.as_str())) {
        found.retain(|synonym| synonym.source != ConfigSource::Default);
    }
    found
}

/// Where one of `names` has a value: by layer, then by name, the table's defaults last.
fn given(names: &[&'static str], layers: &Layers<'_>) -> Vec<ConfigSynonym> {
    let mut found = Vec::new();
    for (source, map) in layers.in_order() {
        for name in names {
            if let Some(value) = map.get(*name) {
                found.push(ConfigSynonym { name: name.to_string(), value: Some(value.clone()), source });
            }
        }
    }
    for name in names {
        if let Some(default) = broker_def(name).and_then(|row| row.def.default) {
            let value = Some(default.to_string());
            found.push(ConfigSynonym { name: name.to_string(), value, source: ConfigSource::Default });
        }
    }
    found
}

/// Every configuration of this broker, sorted by name.
pub fn broker_configs(image: &MetadataImage, config: &BrokerConfig) -> Vec<DescribedConfig> {
    let layers = Layers { fixed: &config.values, ..image.layers() };
    let mut all: Vec<DescribedConfig> =
        BROKER_CONFIGS.iter().map(|row| broker_entry(row, &layers, config)).collect();
    let unknown: BTreeSet<&String> =
        layers.in_order().flat_map(|(_, map)| map.keys()).filter(|name| broker_def(name).is_none()).collect();
    for name in unknown {
        let given = layers.in_order().filter(|(_, map)| map.contains_key(name)).map(|(source, _)| source);
        all.push(unknown_entry(name, given.collect()));
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// A broker config that this broker does not know, as some plugin or tool set it. Kafka's rule: what has no definition
/// may be a secret, so its value is not shown.
fn unknown_entry(name: &str, given: Vec<ConfigSource>) -> DescribedConfig {
    let synonyms: Vec<ConfigSynonym> = given
        .into_iter()
        .map(|source| ConfigSynonym { name: name.to_string(), value: None, source })
        .collect();
    DescribedConfig {
        name: name.to_string(),
        value: None,
        source: synonyms.first().map_or(ConfigSource::Default, |synonym| synonym.source),
        read_only: false,
        sensitive: true,
        kind: ConfigKind::String,
        documentation: "Not known to this broker. Accepted and reported; it has no effect here.".to_string(),
        synonyms,
    }
}

fn broker_entry(
    row: &'static BrokerConfigDef,
    layers: &Layers<'_>,
    config: &BrokerConfig,
) -> DescribedConfig {
    let def = &row.def;
    let synonyms = if def.is_sensitive() {
        let set = def.name == "clickhouse.password" && config.clickhouse_password.is_some();
        let hidden =
            ConfigSynonym { name: def.name.to_string(), value: None, source: ConfigSource::StaticBroker };
        if set { vec![hidden] } else { Vec::new() }
    } else {
        given(&synonyms(def.name), layers)
    };
    // The value is the config's own, also where another unit of the same setting counts.
    let own = synonyms.iter().find(|synonym| synonym.name == def.name);
    DescribedConfig {
        name: def.name.to_string(),
        value: own.and_then(|synonym| synonym.value.clone()),
        source: own.or(synonyms.first()).map_or(ConfigSource::Default, |synonym| synonym.source),
        read_only: !row.dynamic,
        sensitive: def.is_sensitive(),
        kind: def.kind,
        documentation: def.documentation(),
        synonyms,
    }
}

/// Every configuration that a group of this name has, sorted by name.
fn group_configs(group: &str, image: &MetadataImage) -> Vec<DescribedConfig> {
    let own = image.group_configs.get(group);
    GROUP_CONFIGS
        .iter()
        .map(|row| {
            let default = ConfigSynonym {
                name: row.broker_synonym.to_string(),
                value: row.def.default.map(str::to_string),
                source: ConfigSource::Default,
            };
            let set = own.and_then(|configs| configs.get(row.def.name)).map(|value| ConfigSynonym {
                name: row.def.name.to_string(),
                value: Some(value.clone()),
                source: ConfigSource::Group,
            });
            let synonyms: Vec<ConfigSynonym> = set.into_iter().chain([default]).collect();
            DescribedConfig {
                name: row.def.name.to_string(),
                value: synonyms[0].value.clone(),
                source: synonyms[0].source,
                read_only: false,
                sensitive: false,
                kind: row.def.kind,
                documentation: row.def.documentation(),
                synonyms,
            }
        })
        .collect()
}

/// The resource `""` of brokers: what was altered for all of them.
fn cluster_defaults(image: &MetadataImage) -> Vec<DescribedConfig> {
    image
        .broker_configs
        .iter()
        .map(|(name, value)| {
            let Some(row) = broker_def(name) else {
                return unknown_entry(name, vec![ConfigSource::DynamicDefaultBroker]);
            };
            let value = if row.def.is_sensitive() { None } else { Some(value.clone()) };
            DescribedConfig {
                name: name.clone(),
                value: value.clone(),
                source: ConfigSource::DynamicDefaultBroker,
                read_only: !row.dynamic,
                sensitive: row.def.is_sensitive(),
                kind: row.def.kind,
                documentation: row.def.documentation(),
                synonyms: vec![ConfigSynonym {
                    name: name.clone(),
                    value,
                    source: ConfigSource::DynamicDefaultBroker,
                }],
            }
        })
        .collect()
}
