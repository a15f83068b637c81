//! The guard against `kafka-protocol`'s own encoder and decoder, for every served request and version.

mod support;

use bytes::Bytes;
use flumen_protocol::api;
use flumen_protocol::guard::check_request;
use kafka_protocol::messages::{ApiKey, RequestKind};
use support::{default_request, encode, guarded_versions, rich_request};

fn decode(key: i16, version: i16, body: &mut Bytes) -> RequestKind {
    let api_key = ApiKey::try_from(key).expect("known key");
    RequestKind::decode(api_key, body, version).expect("what the guard accepts decodes")
}

#[test]
fn accepts_default_and_rich_requests_of_every_version() {
    for (key, version) in guarded_versions() {
        for request in [default_request(key), rich_request(key, version)] {
            let body = encode(&request, version);
            assert_eq!(check_request(key, version, &body), Ok(()), "{key} v{version} {request:?}");
        }
    }
}

#[test]
fn rich_requests_use_every_field_of_their_version() {
    // A field that the builder forgot would leave a hole in every other test here: what is decoded must differ from
    // the default in length at least.
    for (key, version) in guarded_versions() {
        let (rich, plain) =
            (encode(&rich_request(key, version), version), encode(&default_request(key), version));
        let fixed = [(api::LIST_GROUPS, 3), (api::API_VERSIONS, 3), (api::DESCRIBE_CLUSTER, 0)];
        let no_fields = fixed.iter().any(|&(k, v)| k == key && version < v);
        assert!(no_fields || rich.len() > plain.len(), "{key} v{version}");
    }
}

#[test]
fn every_truncation_is_refused_or_still_a_whole_request() {
    for (key, version) in guarded_versions() {
        let body = encode(&rich_request(key, version), version);
        for end in 0..body.len() {
            if check_request(key, version, &body[..end]).is_ok() {
                let mut rest = body.slice(..end);
                decode(key, version, &mut rest);
                assert!(rest.is_empty(), "{key} v{version} cut at {end}");
            }
        }
    }
}

#[test]
fn bytes_after_the_end_are_ignored() {
    for (key, version) in guarded_versions() {
        let whole = encode(&rich_request(key, version), version);
        let longer = [&whole[..], &[1, 0, 0]].concat();
        assert_eq!(check_request(key, version, &longer), Ok(()), "{key} v{version}");
        let mut rest = bytes::Bytes::from(longer);
        assert_eq!(
            decode(key, version, &mut rest),
            decode(key, version, &mut whole.clone()),
            "{key} v{version}"
        );
        assert_eq!(&rest[..], [1, 0, 0], "{key} v{version}");
    }
}

#[test]
fn ordinary_large_requests_pass() {
    use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
    use kafka_protocol::messages::{MetadataRequest, TopicName};
    let topics = (0..20_000)
        .map(|n| MetadataRequestTopic::default().with_name(Some(TopicName(support::s(&format!("t{n:05}"))))))
        .collect();
    let request = RequestKind::Metadata(MetadataRequest::default().with_topics(Some(topics)));
    for version in 0..=13 {
        assert_eq!(check_request(api::METADATA, version, &encode(&request, version)), Ok(()), "v{version}");
    }
}
