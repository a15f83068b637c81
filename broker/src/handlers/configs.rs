//! DescribeConfigs, AlterConfigs, IncrementalAlterConfigs.

use flumen_metadata::admin;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::{AlterConfigsRequest, DescribeConfigsRequest, IncrementalAlterConfigsRequest};

use crate::dispatch::{Answer, Request, RequestError};
use crate::topic_admin::commit_plan;

pub fn describe_configs(request: &Request<'_>) -> Result<Answer, RequestError> {
    let describe: DescribeConfigsRequest = request.decode()?;
    let image = request.shard.node.image.load();
    request.answer(&admin::describe_configs(&describe, &image, &request.shard.node.config))
}

pub async fn alter_configs(request: &Request<'_>) -> Result<Answer, RequestError> {
    let alter: AlterConfigsRequest = request.decode()?;
    let response = commit_plan(&request.shard.node, move |image, config| {
        admin::alter_configs(&alter, image, config).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    request.answer(&response)
}

pub async fn incremental_alter_configs(request: &Request<'_>) -> Result<Answer, RequestError> {
    let alter: IncrementalAlterConfigsRequest = request.decode()?;
    let response = commit_plan(&request.shard.node, move |image, config| {
        admin::incremental_alter_configs(&alter, image, config).into_parts()
    })
    .await
    .map_err(|e: ErrorCode| request.malformed(e.to_string()))?;
    request.answer(&response)
}
