//! DescribeCluster: who is here.

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::describe_cluster_response::DescribeClusterBroker;
use kafka_protocol::messages::{BrokerId, DescribeClusterRequest, DescribeClusterResponse};

use super::{CLUSTER_OPERATIONS, Live, OPERATIONS_NOT_ASKED, text};
use crate::image::MetadataImage;

const ENDPOINT_BROKERS: i8 = 1;
const ENDPOINT_CONTROLLERS: i8 = 2;
/// From here on a client may ask for nodes that do not run, too.
const FENCED_MIN_VERSION: i16 = 2;

pub fn describe_cluster(
    request: &DescribeClusterRequest,
    version: i16,
    image: &MetadataImage,
    live: Live<'_>,
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
    response.controller_id = BrokerId(live.controller_id);
    let fenced_too = version >= FENCED_MIN_VERSION && request.include_fenced_brokers;
    let brokers = if fenced_too { image.brokers() } else { live.brokers(image) };
    let brokers = brokers.into_iter().map(|broker| {
        DescribeClusterBroker::default()
            .with_broker_id(BrokerId(broker.id))
            .with_host(text(broker.host))
            .with_port(i32::from(broker.port))
            .with_rack(broker.rack.map(text))
            .with_is_fenced(fenced_too && !(live.is_up)(broker.id))
    });
    response.brokers = brokers.collect();
    response
}
