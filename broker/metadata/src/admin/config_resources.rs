//! ListConfigResources: who is configured.

use std::collections::{BTreeMap, BTreeSet};

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::list_config_resources_response::ConfigResource;
use kafka_protocol::messages::{ListConfigResourcesRequest, ListConfigResourcesResponse};

use super::config_describe::{
    RESOURCE_BROKER, RESOURCE_BROKER_LOGGER, RESOURCE_CLIENT_METRICS, RESOURCE_GROUP, RESOURCE_TOPIC,
};
use super::text;
use crate::image::MetadataImage;

/// Version 0 asks for client metrics, of which there are none; later ones name kinds, or none for all kinds.
pub fn list_config_resources(
    request: &ListConfigResourcesRequest,
    version: i16,
    image: &MetadataImage,
) -> ListConfigResourcesResponse {
    const ALL: [i8; 5] =
        [RESOURCE_TOPIC, RESOURCE_BROKER, RESOURCE_BROKER_LOGGER, RESOURCE_CLIENT_METRICS, RESOURCE_GROUP];
    let asked: BTreeSet<i8> = match version {
        0 => BTreeSet::from([RESOURCE_CLIENT_METRICS]),
        _ if request.resource_types.is_empty() => ALL.into_iter().collect(),
        _ => request.resource_types.iter().copied().collect(),
    };
    if !asked.iter().all(|kind| ALL.contains(kind)) {
        return ListConfigResourcesResponse::default().with_error_code(ErrorCode::UNSUPPORTED_VERSION.0);
    }
    let brokers = || image.brokers().iter().map(|broker| broker.id.to_string()).collect();
    let mut by_kind: BTreeMap<i8, Vec<String>> = BTreeMap::new();
    for kind in asked {
        let names = match kind {
            RESOURCE_TOPIC => image.topics.keys().cloned().collect(),
            RESOURCE_BROKER | RESOURCE_BROKER_LOGGER => brokers(),
            RESOURCE_GROUP => image.group_configs.keys().cloned().collect(),
            _ => Vec::new(),
        };
        by_kind.insert(kind, names);
    }
    let resources = by_kind.into_iter().flat_map(|(kind, names)| {
        names.into_iter().map(move |name| {
            let resource = ConfigResource::default().with_resource_name(text(&name));
            if version >= 1 { resource.with_resource_type(kind) } else { resource }
        })
    });
    ListConfigResourcesResponse::default().with_config_resources(resources.collect())
}
