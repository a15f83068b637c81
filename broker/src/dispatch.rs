//! From a frame to the handler of its API: header, version, guard, decode. One match.
//!
//! Every frame passes the guard before generated code decodes it; Produce has a decoder of its own.
//! A frame that is not a request of a served API and version ends the connection, as Kafka does, except
//! ApiVersions, whose too-new versions are answered so that the client can step down.

use std::rc::Rc;
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use flumen_protocol::error_code::ErrorCode;
use flumen_protocol::header::{self, HeaderError, RequestHeader};
use flumen_protocol::{api, guard};
use kafka_protocol::messages::ApiKey;
use kafka_protocol::protocol::{Decodable, Encodable};
use tokio::sync::oneshot;

use crate::cluster::forward;
use crate::handlers;
use crate::net::connection::Peer;
use crate::shard::Shard;

/// What the connection's writer gets for a request.
pub enum Answer {
    /// acks=0: the client expects nothing.
    None,
    Ready(Vec<Bytes>),
    Waiting(Waiting),
}

/// A produce whose records are on their way to the disk.
pub struct Waiting {
    pub parts: Vec<Part>,
    pub finish: Box<dyn FnOnce(Vec<handlers::produce::Results>) -> Finished>,
}

/// What becomes of a produce whose partitions have all answered.
pub enum Finished {
    Send(Bytes),
    /// acks=0: the client expects nothing.
    Silent,
    /// acks=0 and an error.
    Close,
}

pub enum Part {
    Done(handlers::produce::Results),
    Pending(oneshot::Receiver<handlers::produce::Results>),
}

impl Waiting {
    /// Whether `finish` would return without waiting; takes over what has arrived.
    pub fn is_ready(&mut self) -> bool {
        for part in &mut self.parts {
            if let Part::Pending(receiver) = part {
                match receiver.try_recv() {
                    Ok(results) => *part = Part::Done(results),
                    Err(_) => return false,
                }
            }
        }
        true
    }

    /// `None` closes the connection: the outcome will never be known (a shard stopped), or cannot be told otherwise.
    pub async fn finish(self) -> Option<Vec<Bytes>> {
        let mut results = Vec::with_capacity(self.parts.len());
        for part in self.parts {
            results.push(match part {
                Part::Done(results) => results,
                Part::Pending(receiver) => receiver.await.ok()?,
            });
        }
        // acks=0 waits like any other, so that an error can close the connection.
        match (self.finish)(results) {
            Finished::Send(bytes) => Some(vec![bytes]),
            Finished::Silent => Some(Vec::new()),
            Finished::Close => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("frame of {0} bytes is too short for a request")]
    Short(usize),
    #[error("bad request header: {0}")]
    Header(#[from] HeaderError),
    #[error("request of api {api_key} version {api_version} refused: {reason}")]
    Malformed { api_key: i16, api_version: i16, reason: String },
    #[error("acks=0 produce failed with {0}; closing the connection is the only way to say so")]
    Unanswerable(ErrorCode),
}

/// A request that is not Produce, ready for its handler.
pub struct Request<'a> {
    pub shard: &'a Rc<Shard>,
    pub peer: &'a Peer,
    pub header: RequestHeader,
    pub body: Bytes,
}

impl Request<'_> {
    pub fn client_id(&self) -> &str {
        self.header.client_id.as_deref().unwrap_or("")
    }

    pub fn decode<R: Decodable>(&self) -> Result<R, RequestError> {
        let mut body = self.body.clone();
        R::decode(&mut body, self.header.api_version).map_err(|e| self.malformed(e.root_cause().to_string()))
    }

    pub fn malformed(&self, reason: String) -> RequestError {
        RequestError::Malformed { api_key: self.header.api_key, api_version: self.header.api_version, reason }
    }

    pub fn answer<R: Encodable>(&self, response: &R) -> Result<Answer, RequestError> {
        let version = self.header.api_version;
        encode(self.header.api_key, version, self.header.correlation_id, response)
            .map(|bytes| Answer::Ready(vec![bytes]))
            .map_err(|reason| self.malformed(reason))
    }
}

fn encode<R: Encodable>(key: i16, version: i16, correlation_id: i32, response: &R) -> Result<Bytes, String> {
    let mut buffer = BytesMut::with_capacity(256);
    buffer.put_i32(0);
    header::put_response_header(&mut buffer, key, version, correlation_id);
    response.encode(&mut buffer, version).map_err(|e| e.root_cause().to_string())?;
    let length = i32::try_from(buffer.len() - 4).map_err(|_| "response too large".to_string())?;
    buffer[..4].copy_from_slice(&length.to_be_bytes());
    Ok(buffer.freeze())
}

pub async fn handle(shard: &Rc<Shard>, peer: &Peer, frame: BytesMut) -> Result<Answer, RequestError> {
    let (key, version, correlation_id) = header::peek(&frame).ok_or(RequestError::Short(frame.len()))?;
    if key == ApiKey::ApiVersions as i16 && !api::supports(key, version) {
        let response = flumen_metadata::admin::api_versions(ErrorCode::UNSUPPORTED_VERSION);
        return encode(key, 0, correlation_id, &response)
            .map(|b| Answer::Ready(vec![b]))
            .map_err(|reason| RequestError::Malformed { api_key: key, api_version: version, reason });
    }
    let header = header::parse_request_header(&frame)?;
    let started = Instant::now();
    if key == ApiKey::Produce as i16 {
        let answer = handlers::produce::handle(shard, header, frame).await;
        shard.metrics.request(key, started.elapsed());
        return answer;
    }
    let whole = frame.freeze();
    let mut body = whole.clone();
    let body = body.split_off(header.body_offset.min(body.len()));
    guard::check_request(key, version, &body).map_err(|e| RequestError::Malformed {
        api_key: key,
        api_version: version,
        reason: e.to_string(),
    })?;
    if shard.node.cluster.is_some() && !peer.forwarded && is_for_controller(key) {
        match forward::to_controller(shard, whole).await {
            Some(Ok(answer)) => return Ok(answer),
            // Whether it was done is not known: the client has to look.
            Some(Err(reason)) => {
                return Err(RequestError::Malformed { api_key: key, api_version: version, reason });
            }
            None => {}
        }
    }
    let request = Request { shard, peer, header, body };
    let answer = route(&request).await;
    shard.metrics.request(key, started.elapsed());
    answer
}

/// Requests that only the leader of the metadata answers, whoever is asked.
fn is_for_controller(key: i16) -> bool {
    [
        ApiKey::CreateTopics,
        ApiKey::DeleteTopics,
        ApiKey::CreatePartitions,
        ApiKey::AlterConfigs,
        ApiKey::IncrementalAlterConfigs,
        ApiKey::AlterPartitionReassignments,
        ApiKey::ElectLeaders,
        ApiKey::DescribeQuorum,
    ]
    .iter()
    .any(|api| *api as i16 == key)
}

async fn route(request: &Request<'_>) -> Result<Answer, RequestError> {
    let key = ApiKey::try_from(request.header.api_key)
        .map_err(|()| RequestError::Header(HeaderError::UnknownApi { api_key: request.header.api_key }))?;
    match key {
        ApiKey::Fetch => handlers::fetch::handle(request).await,
        ApiKey::ListOffsets => handlers::offsets::list_offsets(request).await,
        ApiKey::OffsetForLeaderEpoch => handlers::offsets::offset_for_leader_epoch(request).await,
        ApiKey::DeleteRecords => handlers::offsets::delete_records(request).await,
        ApiKey::InitProducerId => handlers::producer_id::init_producer_id(request).await,
        ApiKey::ApiVersions => handlers::cluster::api_versions(request),
        ApiKey::Metadata => handlers::cluster::metadata(request).await,
        ApiKey::DescribeCluster => handlers::cluster::describe_cluster(request),
        ApiKey::DescribeTopicPartitions => handlers::cluster::describe_topic_partitions(request),
        ApiKey::DescribeLogDirs => handlers::cluster::describe_log_dirs(request),
        ApiKey::CreateTopics => handlers::topics::create_topics(request).await,
        ApiKey::DeleteTopics => handlers::topics::delete_topics(request).await,
        ApiKey::CreatePartitions => handlers::topics::create_partitions(request).await,
        ApiKey::DescribeConfigs => handlers::configs::describe_configs(request),
        ApiKey::AlterConfigs => handlers::configs::alter_configs(request).await,
        ApiKey::IncrementalAlterConfigs => handlers::configs::incremental_alter_configs(request).await,
        ApiKey::FindCoordinator => handlers::groups::find_coordinator(request).await,
        ApiKey::JoinGroup => handlers::groups::join(request).await,
        ApiKey::SyncGroup => handlers::groups::sync(request).await,
        ApiKey::Heartbeat => handlers::groups::heartbeat(request).await,
        ApiKey::LeaveGroup => handlers::groups::leave(request).await,
        ApiKey::OffsetCommit => handlers::groups::offset_commit(request).await,
        ApiKey::OffsetFetch => handlers::groups::offset_fetch(request).await,
        ApiKey::OffsetDelete => handlers::groups::offset_delete(request).await,
        ApiKey::ListGroups => handlers::groups::list(request).await,
        ApiKey::DescribeGroups => handlers::groups::describe(request).await,
        ApiKey::DeleteGroups => handlers::groups::delete(request).await,
        ApiKey::DescribeQuorum => handlers::operations::describe_quorum(request).await,
        ApiKey::ElectLeaders => handlers::operations::elect_leaders(request).await,
        ApiKey::AlterPartitionReassignments => {
            handlers::operations::alter_partition_reassignments(request).await
        }
        ApiKey::ListPartitionReassignments => handlers::operations::list_partition_reassignments(request),
        ApiKey::ListConfigResources => handlers::operations::list_config_resources(request),
        ApiKey::DescribeProducers => handlers::operations::describe_producers(request).await,
        ApiKey::DescribeClientQuotas => handlers::operations::describe_client_quotas(request),
        ApiKey::AlterClientQuotas => handlers::operations::alter_client_quotas(request),
        ApiKey::DescribeUserScramCredentials => {
            handlers::operations::describe_user_scram_credentials(request)
        }
        ApiKey::DescribeAcls => handlers::operations::describe_acls(request),
        other => Err(request.malformed(format!("{other:?} is not served"))),
    }
}
