//! IncrementalAlterConfigs and AlterConfigs: check the outcome as a whole, then commit only what differs.

use std::collections::{BTreeMap, BTreeSet};

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::alter_configs_response::AlterConfigsResourceResponse as AlterResult;
use kafka_protocol::messages::incremental_alter_configs_response::AlterConfigsResourceResponse as IncrementalResult;
use kafka_protocol::messages::{
    AlterConfigsRequest, AlterConfigsResponse, IncrementalAlterConfigsRequest,
    IncrementalAlterConfigsResponse,
};

use super::config_describe::{
    RESOURCE_BROKER, RESOURCE_GROUP, RESOURCE_TOPIC, check_group_name, known_broker, unsupported_resource,
};
use super::{AdminPlan, Fail, Refused};
use crate::broker_config::{BrokerConfig, ConfigError, check_broker_setting};
use crate::broker_table::{BROKER_CONFIGS, broker_def};
use crate::command::Command;
use crate::config_def::{ConfigDef, ConfigKind, Layers, distance, list, nearest, suggestion};
use crate::group_table::{GROUP_CONFIGS, group_def};
use crate::image::{MetadataImage, Topic};
use crate::topic_config::{broker_level, check_setting, check_together, find_def};
use crate::topic_table::{is_removed, topic_def};

/// Edits between a name and what it was meant to be; real names are farther apart.
const MISSPELT_EDITS_MAX: usize = 2;

/// Overrides by name, before or after a change.
type Overrides = BTreeMap<String, String>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Set,
    Delete,
    Append,
    Subtract,
}

/// One entry of a request, of either API.
struct Change<'a> {
    name: &'a str,
    operation: Operation,
    value: Option<&'a str>,
}

pub fn incremental_alter_configs(
    request: &IncrementalAlterConfigsRequest,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> AdminPlan<IncrementalAlterConfigsResponse> {
    let mut commands = Vec::new();
    let repeated = repeated(request.resources.iter().map(|r| (r.resource_type, r.resource_name.as_str())));
    let responses = request
        .resources
        .iter()
        .map(|resource| {
            let name = resource.resource_name.as_str();
            let changes: Result<Vec<Change<'_>>, Refused> = resource
                .configs
                .iter()
                .map(|entry| {
                    let operation = match entry.config_operation {
                        0 => Operation::Set,
                        1 => Operation::Delete,
                        2 => Operation::Append,
                        3 => Operation::Subtract,
                        other => return Err(invalid_request(format!("Unknown operation type: {other}"))),
                    };
                    Ok(Change { name: entry.name.as_str(), operation, value: entry.value.as_deref() })
                })
                .collect();
            let planned = not_repeated(&repeated, resource.resource_type, name)
                .and(changes)
                .and_then(|changes| plan(resource.resource_type, name, &changes, false, image, config));
            let result = IncrementalResult::default()
                .with_error_message(None)
                .with_resource_type(resource.resource_type)
                .with_resource_name(resource.resource_name.clone());
            match planned {
                Ok(command) => {
                    commands.extend(command);
                    result
                }
                Err(refused) => result.with_error_code(refused.code.0).with_error_message(refused.text()),
            }
        })
        .collect();
    if request.validate_only {
        commands.clear();
    }
    AdminPlan { response: IncrementalAlterConfigsResponse::default().with_responses(responses), commands }
}

/// Replaces all overrides of each resource.
pub fn alter_configs(
    request: &AlterConfigsRequest,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> AdminPlan<AlterConfigsResponse> {
    let mut commands = Vec::new();
    let repeated = repeated(request.resources.iter().map(|r| (r.resource_type, r.resource_name.as_str())));
    let responses = request
        .resources
        .iter()
        .map(|resource| {
            let name = resource.resource_name.as_str();
            let changes: Vec<Change<'_>> = resource
                .configs
                .iter()
                .map(|entry| Change {
                    name: entry.name.as_str(),
                    operation: Operation::Set,
                    value: entry.value.as_deref(),
                })
                .collect();
            let planned = not_repeated(&repeated, resource.resource_type, name)
                .and_then(|()| plan(resource.resource_type, name, &changes, true, image, config));
            let result = AlterResult::default()
                .with_error_message(None)
                .with_resource_type(resource.resource_type)
                .with_resource_name(resource.resource_name.clone());
            match planned {
                Ok(command) => {
                    commands.extend(command);
                    result
                }
                Err(refused) => result.with_error_code(refused.code.0).with_error_message(refused.text()),
            }
        })
        .collect();
    if request.validate_only {
        commands.clear();
    }
    AdminPlan { response: AlterConfigsResponse::default().with_responses(responses), commands }
}

/// Sets (`Some`) and removes (`None`) overrides of a topic, for callers that do not speak Kafka's protocol.
pub fn plan_topic_configs(
    image: &MetadataImage,
    config: &BrokerConfig,
    topic: &str,
    changes: &BTreeMap<String, Option<String>>,
) -> Result<Vec<Command>, Refused> {
    Ok(plan(RESOURCE_TOPIC, topic, &settings(changes), false, image, config)?.into_iter().collect())
}

/// The same for all brokers, or for one.
pub fn plan_broker_configs(
    image: &MetadataImage,
    config: &BrokerConfig,
    node_id: Option<i32>,
    changes: &BTreeMap<String, Option<String>>,
) -> Result<Vec<Command>, Refused> {
    let name = node_id.map_or_else(String::new, |id| id.to_string());
    Ok(plan(RESOURCE_BROKER, &name, &settings(changes), false, image, config)?.into_iter().collect())
}

fn settings(changes: &BTreeMap<String, Option<String>>) -> Vec<Change<'_>> {
    changes
        .iter()
        .map(|(name, value)| Change {
            name,
            operation: if value.is_some() { Operation::Set } else { Operation::Delete },
            value: value.as_deref(),
        })
        .collect()
}

fn repeated<'a>(resources: impl Iterator<Item = (i8, &'a str)>) -> BTreeSet<(i8, String)> {
    let mut seen = BTreeSet::new();
    resources
        .filter(|resource| !seen.insert(*resource))
        .map(|(kind, name)| (kind, name.to_string()))
        .collect()
}

fn not_repeated(repeated: &BTreeSet<(i8, String)>, kind: i8, name: &str) -> Result<(), Refused> {
    if repeated.contains(&(kind, name.to_string())) {
        return Err(invalid_request("Each resource must appear at most once."));
    }
    Ok(())
}

fn invalid_request(message: impl Into<String>) -> Refused {
    Refused::new(ErrorCode::INVALID_REQUEST, message)
}

fn invalid_config(message: impl Into<String>) -> Refused {
    Refused::new(ErrorCode::INVALID_CONFIG, message)
}

/// The command that makes one resource look as asked; none when it already does.
fn plan(
    resource_type: i8,
    resource_name: &str,
    changes: &[Change<'_>],
    replace: bool,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Result<Option<Command>, Refused> {
    let mut names = BTreeSet::new();
    if let Some(twice) = changes.iter().find(|change| !names.insert(change.name)) {
        return Err(invalid_request(format!("Error due to duplicate config keys: {}", twice.name)));
    }
    let nulls: Vec<&str> = changes
        .iter()
        .filter(|change| change.operation != Operation::Delete && change.value.is_none())
        .map(|change| change.name)
        .collect();
    if !nulls.is_empty() {
        return Err(invalid_request(format!("Null value not supported for : {}", nulls.join(","))));
    }
    match resource_type {
        RESOURCE_TOPIC => plan_topic(resource_name, changes, replace, image, config),
        RESOURCE_BROKER => plan_broker(resource_name, changes, replace, image, config),
        RESOURCE_GROUP => plan_group(resource_name, changes, replace, image),
        other => Err(unsupported_resource(other)),
    }
}

fn plan_topic(
    name: &str,
    changes: &[Change<'_>],
    replace: bool,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Result<Option<Command>, Refused> {
    if name.is_empty() {
        return Err(invalid_request("Default topic resources are not allowed."));
    }
    crate::topic_name::check(name)
        .map_err(|reason| Refused::new(ErrorCode::INVALID_TOPIC_EXCEPTION, reason))?;
    let topic: &Topic = image.topics.get(name).ok_or_else(|| {
        Refused::new(ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, format!("The topic '{name}' does not exist."))
    })?;
    let layers = Layers { fixed: &config.values, ..image.layers() };
    let mut after = if replace { Overrides::new() } else { topic.configs.clone() };
    for change in changes {
        if change.operation == Operation::Delete {
            after.remove(change.name);
            continue;
        }
        if is_removed(change.name) {
            continue;
        }
        let inherited =
            || topic_def(change.name).and_then(|row| broker_level(row, &layers)).map(|(_, _, v)| v);
        let value = new_value(change, find_def(change.name, config), after.get(change.name), inherited)?;
        if let Some(value) = check_setting(change.name, &value, config).map_err(invalid_config)? {
            after.insert(change.name.to_string(), value);
        }
    }
    check_together(&after, &layers, config).map_err(invalid_config)?;
    let set = difference(&topic.configs, after);
    Ok((!set.is_empty()).then_some(Command::SetTopicConfigs { topic_id: topic.id, set }))
}

fn plan_broker(
    name: &str,
    changes: &[Change<'_>],
    replace: bool,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Result<Option<Command>, Refused> {
    let node_id = if name.is_empty() { None } else { Some(known_broker(name, image)?) };
    let nothing = Overrides::new();
    let before = match node_id {
        None => &image.broker_configs,
        Some(id) => image.node_configs.get(&id).unwrap_or(&nothing),
    };
    let layers = match node_id {
        // Only that node knows its configuration file.
        Some(id) if id != image.node.id => Layers { node: Some(before), fixed: &nothing, ..image.layers() },
        _ => Layers { fixed: &config.values, ..image.layers() },
    };
    let mut after = if replace { Overrides::new() } else { before.clone() };
    for change in changes {
        let row = broker_def(change.name);
        if let Some(row) = row
            && !row.dynamic
        {
            let message = format!("Cannot update these configs dynamically: {}", change.name);
            return Err(invalid_request(message));
        }
        if change.operation == Operation::Delete {
            after.remove(change.name);
            continue;
        }
        let inherited = || layers.in_order().find_map(|(_, map)| map.get(change.name)).cloned();
        let value = new_value(change, row.map(|row| row.def), after.get(change.name), inherited)?;
        let value = match check_broker_setting(change.name, &value) {
            Ok(value) => value,
            // As in Kafka a plugin may bring names of its own. One letter away from a known name is a mistake, though.
            Err(ConfigError::Unknown { .. }) if !is_misspelt(change.name) => value,
            // Kafka's code for a broker's value; a topic's is INVALID_CONFIG.
            Err(error @ ConfigError::Invalid { .. }) => return Err(invalid_request(error.to_string())),
            Err(error) => return Err(invalid_config(error.to_string())),
        };
        after.insert(change.name.to_string(), value);
    }
    let set = difference(before, after);
    if set.is_empty() {
        return Ok(None);
    }
    let command = Command::SetBrokerConfigs { node_id, set };
    check_broker_outcome(&command, image, config)?;
    Ok(Some(command))
}

fn plan_group(
    name: &str,
    changes: &[Change<'_>],
    replace: bool,
    image: &MetadataImage,
) -> Result<Option<Command>, Refused> {
    check_group_name(name)?;
    let nothing = Overrides::new();
    let before = image.group_configs.get(name).unwrap_or(&nothing);
    let mut after = if replace { Overrides::new() } else { before.clone() };
    for change in changes {
        let Some(row) = group_def(change.name) else {
            let near = suggestion(change.name, GROUP_CONFIGS.iter().map(|row| row.def.name));
            return Err(invalid_config(format!("Unknown group config name: {}{near}", change.name)));
        };
        if change.operation == Operation::Delete {
            after.remove(change.name);
            continue;
        }
        let value = new_value(change, Some(row.def), after.get(change.name), || None)?;
        let value = row.def.normalise(&value).map_err(|reason| {
            invalid_config(format!("Invalid value {value} for configuration {}: {reason}", change.name))
        })?;
        after.insert(change.name.to_string(), value);
    }
    let set = difference(before, after);
    Ok((!set.is_empty()).then(|| Command::SetGroupConfigs { group: name.to_string(), set }))
}

/// Whether a name that is not known was probably meant to be one that is.
fn is_misspelt(name: &str) -> bool {
    let known = BROKER_CONFIGS.iter().map(|row| row.def.name);
    nearest(name, known).is_some_and(|near| distance(name, near) <= MISSPELT_EDITS_MAX)
}

/// Defaults of all topics must agree with each other as well.
fn check_broker_outcome(
    command: &Command,
    image: &MetadataImage,
    config: &BrokerConfig,
) -> Result<(), Refused> {
    let mut next = image.clone();
    next.apply(command).map_err(|e| invalid_request(e.to_string()))?;
    let layers = Layers { fixed: &config.values, ..next.layers() };
    check_together(&Overrides::new(), &layers, &BrokerConfig { topic_check: None, ..config.clone() })
        .map_err(invalid_config)
}

/// What a SET, APPEND or SUBTRACT makes of the value so far.
fn new_value(
    change: &Change<'_>,
    def: Option<ConfigDef>,
    own: Option<&String>,
    inherited: impl Fn() -> Option<String>,
) -> Result<String, Refused> {
    let given = change.value.unwrap_or("");
    let (Some(def), Operation::Append | Operation::Subtract) = (def, change.operation) else {
        return Ok(given.to_string());
    };
    if def.kind != ConfigKind::List {
        let operation = if change.operation == Operation::Append { "APPEND" } else { "SUBTRACT" };
        return Err(invalid_config(format!(
            "Can't {operation} to key {} because its type is not LIST.",
            change.name
        )));
    }
    let before =
        own.cloned().or_else(inherited).unwrap_or_else(|| def.default.unwrap_or_default().to_string());
    let mut elements: Vec<&str> = list(&before).collect();
    for element in list(given) {
        elements.retain(|known| *known != element);
        if change.operation == Operation::Append {
            elements.push(element);
        }
    }
    Ok(elements.join(","))
}

fn difference(before: &Overrides, mut after: Overrides) -> BTreeMap<String, Option<String>> {
    let mut set = BTreeMap::new();
    for (name, value) in before {
        match after.remove(name) {
            Some(new) if new == *value => {}
            Some(new) => drop(set.insert(name.clone(), Some(new))),
            None => drop(set.insert(name.clone(), None)),
        }
    }
    set.extend(after.into_iter().map(|(name, value)| (name, Some(value))));
    set
}

impl Fail for IncrementalAlterConfigsResponse {
    fn fail(&mut self, error: ErrorCode) {
        for result in self.responses.iter_mut().filter(|result| result.error_code == 0) {
            result.error_code = error.0;
        }
    }
}

impl Fail for AlterConfigsResponse {
    fn fail(&mut self, error: ErrorCode) {
        for result in self.responses.iter_mut().filter(|result| result.error_code == 0) {
            result.error_code = error.0;
        }
    }
}
