//! DescribeConfigs, AlterConfigs, IncrementalAlterConfigs.
//!
//! A change that turns an export on is shown to ClickHouse first: what it could not give is refused here, with the
//! reason, as the admin API refuses it.

use std::collections::BTreeMap;

use flumen_metadata::admin;
use flumen_metadata::{BrokerConfig, Command, MetadataImage};
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::alter_configs_response::AlterConfigsResourceResponse as AlterResult;
use kafka_protocol::messages::incremental_alter_configs_response::AlterConfigsResourceResponse as IncrementalResult;
use kafka_protocol::messages::{AlterConfigsRequest, DescribeConfigsRequest, IncrementalAlterConfigsRequest};
use kafka_protocol::protocol::StrBytes;

use crate::dispatch::{Answer, Request, RequestError};
use crate::export;
use crate::topic_admin::commit_plan;

/// Kafka's number for a topic among the kinds of configured things.
const RESOURCE_TOPIC: i8 = 2;

pub fn describe_configs(request: &Request<'_>) -> Result<Answer, RequestError> {
    let describe: DescribeConfigsRequest = request.decode()?;
    let image = request.shard.node.image.load();
    request.answer(&admin::describe_configs(&describe, &image, &request.shard.node.config))
}

/// Topics whose export ClickHouse cannot give, with the reason; nothing is asked when no export is changed.
pub async fn refused_exports(
    request: &Request<'_>,
    names: impl IntoIterator<Item = impl AsRef<str>>,
    plan: impl FnOnce(&MetadataImage, &BrokerConfig) -> Vec<Command>,
) -> BTreeMap<String, String> {
    if !names.into_iter().any(|name| name.as_ref().starts_with(export::CONFIG_PREFIX)) {
        return BTreeMap::new();
    }
    let node = &request.shard.node;
    let image = node.image.load_full();
    let commands = plan(&image, &node.config);
    node.exports.refusals(&image, &commands).await
}

pub async fn alter_configs(request: &Request<'_>) -> Result<Answer, RequestError> {
    let mut alter: AlterConfigsRequest = request.decode()?;
    let names = alter.resources.iter().flat_map(|r| &r.configs).map(|c| c.name.as_str());
    let refused = refused_exports(request, names, |image, config| {
        admin::alter_configs(&alter.clone().with_validate_only(false), image, config).commands
    })
    .await;
    let kept = |kind: i8, name: &str| kind != RESOURCE_TOPIC || !refused.contains_key(name);
    alter.resources.retain(|r| kept(r.resource_type, r.resource_name.as_str()));
    let mut response = commit_plan(&request.shard.node, move |image, config| {
        admin::alter_configs(&alter, image, config).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    response.responses.extend(refused.into_iter().map(|(topic, reason)| {
        AlterResult::default()
            .with_error_code(ErrorCode::INVALID_CONFIG.0)
            .with_error_message(Some(StrBytes::from_string(reason)))
            .with_resource_type(RESOURCE_TOPIC)
            .with_resource_name(StrBytes::from_string(topic))
    }));
    request.answer(&response)
}

pub async fn incremental_alter_configs(request: &Request<'_>) -> Result<Answer, RequestError> {
    let mut alter: IncrementalAlterConfigsRequest = request.decode()?;
    let names = alter.resources.iter().flat_map(|r| &r.configs).map(|c| c.name.as_str());
    let refused = refused_exports(request, names, |image, config| {
        admin::incremental_alter_configs(&alter.clone().with_validate_only(false), image, config).commands
    })
    .await;
    let kept = |kind: i8, name: &str| kind != RESOURCE_TOPIC || !refused.contains_key(name);
    alter.resources.retain(|r| kept(r.resource_type, r.resource_name.as_str()));
    let mut response = commit_plan(&request.shard.node, move |image, config| {
        admin::incremental_alter_configs(&alter, image, config).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    response.responses.extend(refused.into_iter().map(|(topic, reason)| {
        IncrementalResult::default()
            .with_error_code(ErrorCode::INVALID_CONFIG.0)
            .with_error_message(Some(StrBytes::from_string(reason)))
            .with_resource_type(RESOURCE_TOPIC)
            .with_resource_name(StrBytes::from_string(topic))
    }));
    request.answer(&response)
}
