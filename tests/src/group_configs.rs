//! Configurations of consumer groups as commands for the metadata log: cheap, one each, and readable again.

use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::incremental_alter_configs_request::{AlterConfigsResource, AlterableConfig};
use kafka_protocol::messages::{DescribeConfigsRequest, IncrementalAlterConfigsRequest};

use crate::wire::{Wire, text};

const GROUP: i8 = 32;
const NAME: &str = "consumer.session.timeout.ms";

/// One command in the metadata log per group, in one request.
pub fn set_all(wire: &mut Wire, groups: usize, value: i32) {
    let resources = (0..groups)
        .map(|i| {
            AlterConfigsResource::default()
                .with_resource_type(GROUP)
                .with_resource_name(text(&format!("group-{i}")))
                .with_configs(vec![
                    AlterableConfig::default()
                        .with_name(text(NAME))
                        .with_value(Some(text(&value.to_string()))),
                ])
        })
        .collect();
    let request = IncrementalAlterConfigsRequest::default().with_resources(resources);
    let response = wire.ask(1, &request).unwrap();
    assert!(response.responses.iter().all(|r| r.error_code == 0));
}

pub fn value_of(wire: &mut Wire, group: usize) -> String {
    let resource = DescribeConfigsResource::default()
        .with_resource_type(GROUP)
        .with_resource_name(text(&format!("group-{group}")))
        .with_configuration_keys(Some(vec![text(NAME)]));
    let request = DescribeConfigsRequest::default().with_resources(vec![resource]);
    wire.ask(4, &request).unwrap().results[0].configs[0].value.as_deref().unwrap().to_string()
}
