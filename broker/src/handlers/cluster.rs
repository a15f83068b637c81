//! What clients ask to find their way: ApiVersions, Metadata, and the describe requests.

use flumen_metadata::admin::{self, LogDir};
use kafka_protocol::messages::{
    ApiVersionsRequest, DescribeClusterRequest, DescribeLogDirsRequest, DescribeTopicPartitionsRequest,
    MetadataRequest,
};

use crate::dispatch::{Answer, Request, RequestError};
use crate::topic_admin::{auto_create, status_of, with_live};

pub fn api_versions(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: ApiVersionsRequest = request.decode()?;
    request.answer(&admin::answer_api_versions(&asked, request.header.api_version))
}

pub async fn metadata(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: MetadataRequest = request.decode()?;
    let node = &request.shard.node;
    let version = request.header.api_version;
    let plan = |node: &crate::node::Node| {
        let image = node.image.load();
        with_live(node, |live| admin::metadata(&asked, version, &image, &node.config, live))
    };
    let first = plan(node);
    if first.to_create.is_empty() {
        return request.answer(&first.response);
    }
    for name in &first.to_create {
        // A topic that somebody else created first is as good; any other refusal shows in the answer.
        if let Err(error) = auto_create(node, name).await {
            tracing::debug!(topic = %name, %error, "not created on demand");
        }
    }
    request.answer(&plan(node).response)
}

pub fn describe_cluster(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DescribeClusterRequest = request.decode()?;
    let node = &request.shard.node;
    let image = node.image.load();
    let version = request.header.api_version;
    request.answer(&with_live(node, |live| admin::describe_cluster(&asked, version, &image, live)))
}

pub fn describe_topic_partitions(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DescribeTopicPartitionsRequest = request.decode()?;
    let node = &request.shard.node;
    let image = node.image.load();
    request.answer(&with_live(node, |live| admin::describe_topic_partitions(&asked, &image, live)))
}

pub fn describe_log_dirs(request: &Request<'_>) -> Result<Answer, RequestError> {
    let asked: DescribeLogDirsRequest = request.decode()?;
    let node = &request.shard.node;
    let image = node.image.load();
    let path = node.data_dir.to_string_lossy();
    let usable_bytes = flumen_io::FileSystem::machine()
        .free_bytes(&node.data_dir)
        .ok()
        .and_then(|b| i64::try_from(b).ok())
        .unwrap_or(-1);
    let dir = LogDir { path: &path, total_bytes: -1, usable_bytes };
    request.answer(&admin::describe_log_dirs(&asked, request.header.api_version, &image, dir, &|group| {
        status_of(node, group)
    }))
}
