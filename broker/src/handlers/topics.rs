//! CreateTopics, DeleteTopics, CreatePartitions: plan, commit, answer.

use flumen_metadata::admin;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::{CreatePartitionsRequest, CreateTopicsRequest, DeleteTopicsRequest};
use uuid::Uuid;

use crate::dispatch::{Answer, Request, RequestError};
use crate::topic_admin::commit_plan;

pub async fn create_topics(request: &Request<'_>) -> Result<Answer, RequestError> {
    let create: CreateTopicsRequest = request.decode()?;
    let version = request.header.api_version;
    let ids: Vec<Uuid> = create.topics.iter().map(|_| Uuid::new_v4()).collect();
    let response = commit_plan(&request.shard.node, move |image, config| {
        admin::create_topics(&create, version, image, config, ids).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
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
    let response = commit_plan(&request.shard.node, move |image, _| {
        admin::create_partitions(&create, image).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    request.answer(&response)
}
