//! Quotas, SCRAM credentials and ACLs: there are none, and that is what the tools are told.
//!
//! To describe them is answered as Kafka answers where none exist. To set a quota is refused, because it would be stored
//! and not enforced.

use std::collections::{BTreeMap, BTreeSet};

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::alter_client_quotas_response::{EntityData, EntryData};
use kafka_protocol::messages::describe_client_quotas_request::ComponentData;
use kafka_protocol::messages::describe_user_scram_credentials_response::DescribeUserScramCredentialsResult;
use kafka_protocol::messages::{
    AlterClientQuotasRequest, AlterClientQuotasResponse, DescribeAclsResponse, DescribeClientQuotasRequest,
    DescribeClientQuotasResponse, DescribeUserScramCredentialsRequest, DescribeUserScramCredentialsResponse,
};

use super::{Refused, text};

const MATCH_EXACT: i8 = 0;
const MATCH_DEFAULT: i8 = 1;
const MATCH_ANY: i8 = 2;
const QUOTA_ENTITIES: [&str; 3] = ["user", "client-id", "ip"];

pub fn describe_client_quotas(request: &DescribeClientQuotasRequest) -> DescribeClientQuotasResponse {
    let response = DescribeClientQuotasResponse::default().with_error_message(None);
    let mut seen = BTreeSet::new();
    let checked = request.components.iter().try_for_each(|component| {
        check_component(component)?;
        if seen.insert(component.entity_type.as_str()) {
            return Ok(());
        }
        let message =
            format!("Entity type {} cannot appear more than once in the filter.", component.entity_type);
        Err(Refused::new(ErrorCode::INVALID_REQUEST, message))
    });
    match checked {
        Ok(()) => response.with_entries(Some(Vec::new())),
        Err(refused) => {
            response.with_error_code(refused.code.0).with_error_message(refused.text()).with_entries(None)
        }
    }
}

fn check_component(component: &ComponentData) -> Result<(), Refused> {
    let invalid = |message: String| Err(Refused::new(ErrorCode::INVALID_REQUEST, message));
    let kind = component.entity_type.as_str();
    if kind.is_empty() {
        return invalid("Invalid empty entity type.".to_string());
    }
    if !QUOTA_ENTITIES.contains(&kind) {
        return Err(Refused::new(ErrorCode::UNSUPPORTED_VERSION, format!("Unsupported entity type {kind}")));
    }
    match (component.match_type, &component._match) {
        (MATCH_EXACT, None) => {
            invalid("Request specified MATCH_TYPE_EXACT, but set match string to null.".to_string())
        }
        (MATCH_EXACT, Some(_)) | (MATCH_DEFAULT | MATCH_ANY, None) => Ok(()),
        (MATCH_DEFAULT | MATCH_ANY, Some(_)) => {
            invalid("Request matches a default or any name, but names one.".to_string())
        }
        (other, _) => invalid(format!("Unknown match type {other}")),
    }
}

pub fn alter_client_quotas(request: &AlterClientQuotasRequest) -> AlterClientQuotasResponse {
    let entries = request.entries.iter().map(|entry| {
        let entities = entry.entity.iter().map(|entity| {
            EntityData::default()
                .with_entity_type(entity.entity_type.clone())
                .with_entity_name(entity.entity_name.clone())
        });
        EntryData::default()
            .with_entity(entities.collect())
            .with_error_code(ErrorCode::INVALID_REQUEST.0)
            .with_error_message(Some(text("Quotas are not enforced by this broker, so none is stored.")))
    });
    AlterClientQuotasResponse::default().with_entries(entries.collect())
}

pub fn describe_user_scram_credentials(
    request: &DescribeUserScramCredentialsRequest,
) -> DescribeUserScramCredentialsResponse {
    let mut asked: BTreeMap<&str, usize> = BTreeMap::new();
    for user in request.users.iter().flatten() {
        *asked.entry(user.name.as_str()).or_default() += 1;
    }
    let results = asked.into_iter().map(|(user, times)| {
        let (code, message) = if times > 1 {
            let message = format!(
                "Cannot describe SCRAM credentials for the same user twice in a single request: {user}"
            );
            (ErrorCode::DUPLICATE_RESOURCE, message)
        } else {
            let message = format!("Attempt to describe a user credential that does not exist: {user}");
            (ErrorCode::RESOURCE_NOT_FOUND, message)
        };
        DescribeUserScramCredentialsResult::default()
            .with_user(text(user))
            .with_error_code(code.0)
            .with_error_message(Some(text(&message)))
    });
    DescribeUserScramCredentialsResponse::default().with_error_message(None).with_results(results.collect())
}

pub fn describe_acls() -> DescribeAclsResponse {
    DescribeAclsResponse::default()
        .with_error_code(ErrorCode::SECURITY_DISABLED.0)
        .with_error_message(Some(text("No Authorizer is configured on the broker")))
}
