//! DescribeCluster and FindCoordinator: who is here.

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_cluster_response::DescribeClusterBroker;
use kafka_protocol::messages::find_coordinator_response::Coordinator;
use kafka_protocol::messages::{
    BrokerId, DescribeClusterRequest, DescribeClusterResponse, FindCoordinatorRequest,
    FindCoordinatorResponse,
};

use super::{CLUSTER_OPERATIONS, OPERATIONS_NOT_ASKED, Refused, text};
use crate::image::MetadataImage;

const ENDPOINT_BROKERS: i8 = 1;
const ENDPOINT_CONTROLLERS: i8 = 2;

const KEY_GROUP: i8 = 0;
const KEY_TRANSACTION: i8 = 1;

pub fn describe_cluster(
    request: &DescribeClusterRequest,
    version: i16,
    image: &MetadataImage,
) -> DescribeClusterResponse {
    let mut response = DescribeClusterResponse::default()
        .with_cluster_id(text(&image.cluster_id))
        .with_controller_id(BrokerId(-1))
        .with_cluster_authorized_operations(OPERATIONS_NOT_ASKED);
    let endpoint_type = if version >= 1 { request.endpoint_type } else { ENDPOINT_BROKERS };
    if endpoint_type != ENDPOINT_BROKERS {
        let (code, message) = if endpoint_type == ENDPOINT_CONTROLLERS {
            (ErrorCode::MISMATCHED_ENDPOINT_TYPE, "This is a broker endpoint; ask it for brokers.")
        } else {
            (ErrorCode::UNSUPPORTED_ENDPOINT_TYPE, "The endpoint type is not known.")
        };
        response.error_code = code.0;
        response.error_message = Some(text(message));
        return response;
    }
    if request.include_cluster_authorized_operations {
        response.cluster_authorized_operations = CLUSTER_OPERATIONS;
    }
    let node = &image.node;
    response.controller_id = BrokerId(node.id);
    response.brokers = vec![
        DescribeClusterBroker::default()
            .with_broker_id(BrokerId(node.id))
            .with_host(text(&node.host))
            .with_port(i32::from(node.port))
            .with_rack(node.rack.as_deref().map(text)),
    ];
    response
}

/// Every group is coordinated by this node. `group_ready` says why one cannot be just now (its offsets partition is
/// not there), or `NONE`.
pub fn find_coordinator(
    request: &FindCoordinatorRequest,
    version: i16,
    image: &MetadataImage,
    group_ready: &dyn Fn(&str) -> ErrorCode,
) -> FindCoordinatorResponse {
    let single = [request.key.clone()];
    let keys = if version >= 4 { request.coordinator_keys.as_slice() } else { &single };
    let mut entries: Vec<Coordinator> = keys
        .iter()
        .map(|key| {
            let entry = Coordinator::default().with_key(key.clone()).with_error_message(None);
            match coordinated(request.key_type, key, group_ready) {
                Ok(()) => entry
                    .with_node_id(BrokerId(image.node.id))
                    .with_host(text(&image.node.host))
                    .with_port(i32::from(image.node.port)),
                Err(refused) => entry
                    .with_node_id(BrokerId(-1))
                    .with_port(-1)
                    .with_error_code(refused.code.0)
                    .with_error_message(refused.text()),
            }
        })
        .collect();
    let mut response = FindCoordinatorResponse::default().with_error_message(None);
    if version >= 4 {
        response.coordinators = entries;
    } else if let Some(entry) = entries.pop() {
        response.node_id = entry.node_id;
        response.host = entry.host;
        response.port = entry.port;
        response.error_code = entry.error_code;
        response.error_message = entry.error_message;
    }
    response
}

fn coordinated(key_type: i8, key: &str, group_ready: &dyn Fn(&str) -> ErrorCode) -> Result<(), Refused> {
    match key_type {
        KEY_GROUP => match group_ready(key) {
            ErrorCode::NONE => Ok(()),
            code => Err(Refused::new(code, "The group's coordinator is not available.")),
        },
        // Retriable on purpose: a fatal code would make clients give up where a later release serves them.
        KEY_TRANSACTION => Err(Refused::new(
            ErrorCode::COORDINATOR_NOT_AVAILABLE,
            "Transactions are not served by this broker yet.",
        )),
        other => {
            Err(Refused::new(ErrorCode::INVALID_REQUEST, format!("Coordinator type {other} is not known.")))
        }
    }
}
