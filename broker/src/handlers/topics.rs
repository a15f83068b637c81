//! CreateTopics, DeleteTopics, CreatePartitions: plan, commit, answer.

use flumen_metadata::admin;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::create_topics_response::CreatableTopicResult;
use kafka_protocol::messages::{
    CreatePartitionsRequest, CreateTopicsRequest, DeleteTopicsRequest, TopicName,
};
use kafka_protocol::protocol::StrBytes;
use uuid::Uuid;

use crate::dispatch::{Answer, Request, RequestError};
use crate::handlers::configs::refused_exports;
use crate::topic_admin::commit_plan;

pub async fn create_topics(request: &Request<'_>) -> Result<Answer, RequestError> {
    let mut create: CreateTopicsRequest = request.decode()?;
    let version = request.header.api_version;
    let ids: Vec<Uuid> = create.topics.iter().map(|_| Uuid::new_v4()).collect();
    let names = create.topics.iter().flat_map(|t| &t.configs).map(|c| c.name.as_str());
    let node = request.shard.node.clone();
    let refused = refused_exports(request, names, |image, config| {
        let as_if = create.clone().with_validate_only(false);
        node.with_health(|health| {
            admin::create_topics(&as_if, version, image, config, health, ids.clone()).commands
        })
    })
    .await;
    create.topics.retain(|t| !refused.contains_key(t.name.as_str()));
    let mut response = commit_plan(&request.shard.node, move |image, config| {
        node.with_health(|health| {
            admin::create_topics(&create, version, image, config, health, ids).into_parts()
        })
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    response.topics.extend(refused.into_iter().map(|(topic, reason)| {
        CreatableTopicResult::default()
            .with_name(TopicName(StrBytes::from_string(topic)))
            .with_error_code(ErrorCode::INVALID_CONFIG.0)
            .with_error_message(Some(StrBytes::from_string(reason)))
            .with_num_partitions(-1)
            .with_replication_factor(-1)
            .with_configs(None)
    }));
    request.answer(&response)
}

pub async fn delete_topics(request: &Request<'_>) -> Result<Answer, RequestError> {
    let delete: DeleteTopicsRequest = request.decode()?;
    let version = request.header.api_version;
    let response = commit_plan(&request.shard.node, move |image, config| {
        admin::delete_topics(&delete, version, image, config).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    request.answer(&response)
}

pub async fn create_partitions(request: &Request<'_>) -> Result<Answer, RequestError> {
    let create: CreatePartitionsRequest = request.decode()?;
    let node = request.shard.node.clone();
    let response = commit_plan(&request.shard.node, move |image, _| {
        node.with_health(|health| admin::create_partitions(&create, image, health).into_parts())
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    request.answer(&response)
}
