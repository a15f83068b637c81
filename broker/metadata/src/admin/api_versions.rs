//! ApiVersions: what is served, and the feature levels by which tools name the release.

use flumen_protocol::api;
use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::api_versions_response::{ApiVersion, FinalizedFeatureKey, SupportedFeatureKey};
use kafka_protocol::messages::{ApiVersionsRequest, ApiVersionsResponse};
use kafka_protocol::protocol::StrBytes;

/// Level of `metadata.version` that means Kafka 4.1, the release whose API table is served.
const METADATA_VERSION: i16 = 27;
/// Oldest level that Kafka 4.x itself supports.
const METADATA_VERSION_MIN: i16 = 7;
/// Client names are shown to operators; Kafka bounds them by its string type only.
const CLIENT_NAME_BYTES_MAX: usize = 249;

/// The table of served APIs. With an error it carries no features: it then goes out as version 0.
/// `group.version` and `transaction.version` are left out, so that clients keep to what is served.
pub fn api_versions(error: ErrorCode) -> ApiVersionsResponse {
    let keys = api::SERVED
        .iter()
        .map(|served| {
            ApiVersion::default()
                .with_api_key(served.key)
                .with_min_version(served.min_version)
                .with_max_version(served.max_version)
        })
        .collect();
    let response = ApiVersionsResponse::default().with_error_code(error.0).with_api_keys(keys);
    if !error.is_none() {
        return response;
    }
    let name = StrBytes::from_static_str("metadata.version");
    response
        .with_supported_features(vec![
            SupportedFeatureKey::default()
                .with_name(name.clone())
                .with_min_version(METADATA_VERSION_MIN)
                .with_max_version(METADATA_VERSION),
        ])
        .with_finalized_features_epoch(0)
        .with_finalized_features(vec![
            FinalizedFeatureKey::default()
                .with_name(name)
                .with_min_version_level(METADATA_VERSION)
                .with_max_version_level(METADATA_VERSION),
        ])
}

/// As [`api_versions`], refusing a client that names itself in a way Kafka does not allow.
pub fn answer_api_versions(request: &ApiVersionsRequest, version: i16) -> ApiVersionsResponse {
    let named = [&request.client_software_name, &request.client_software_version];
    if version >= 3 && !named.iter().all(|name| is_software_name(name)) {
        return ApiVersionsResponse::default().with_error_code(ErrorCode::INVALID_REQUEST.0);
    }
    api_versions(ErrorCode::NONE)
}

/// Letters and digits, with `-` and `.` between them.
fn is_software_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= CLIENT_NAME_BYTES_MAX
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use kafka_protocol::protocol::{Decodable, Encodable};

    use super::*;

    #[test]
    fn every_version_encodes_and_carries_the_table() {
        for version in 0..=4 {
            let mut out = bytes::BytesMut::new();
            api_versions(ErrorCode::NONE).encode(&mut out, version).unwrap();
            let read = ApiVersionsResponse::decode(&mut out.freeze(), version).unwrap();
            assert_eq!(read.api_keys.len(), api::SERVED.len());
            assert_eq!(read.finalized_features.len(), usize::from(version >= 3));
        }
        let fallback = api_versions(ErrorCode::UNSUPPORTED_VERSION);
        assert_eq!((fallback.error_code, fallback.api_keys.is_empty()), (35, false));
        let mut out = bytes::BytesMut::new();
        fallback.encode(&mut out, 0).unwrap();
    }

    #[test]
    fn odd_client_names_are_refused() {
        let mut request = ApiVersionsRequest::default()
            .with_client_software_name(StrBytes::from_static_str("apache-kafka-java"))
            .with_client_software_version(StrBytes::from_static_str("4.1.0"));
        assert_eq!(answer_api_versions(&request, 3).error_code, 0);
        request.client_software_name = StrBytes::from_static_str("-x");
        assert_eq!(answer_api_versions(&request, 3).error_code, 42);
        assert_eq!(answer_api_versions(&ApiVersionsRequest::default(), 2).error_code, 0);
    }
}
