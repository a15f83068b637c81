//! Where every field of every served request lies, as tables that the guard walks.
//!
//! Only layout: names are for error messages, meaning belongs to the handlers. Whether a version is flexible comes from
//! `api::SERVED`; then strings, bytes and arrays take compact lengths and each struct ends with tagged fields.
//! Produce is absent, having a decoder of its own.

mod admin;
mod data;
mod groups;
mod operations;

use crate::api;

/// Versions in which a field is on the wire, both ends included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Versions(i16, i16);

impl Versions {
    pub(crate) fn contain(self, version: i16) -> bool {
        self.0 <= version && version <= self.1
    }
}

/// Every version the request is served in.
const ANY: Versions = Versions(0, i16::MAX);

const fn since(first: i16) -> Versions {
    Versions(first, i16::MAX)
}

const fn until(last: i16) -> Versions {
    Versions(0, last)
}

const fn between(first: i16, last: i16) -> Versions {
    Versions(first, last)
}

#[derive(Debug)]
pub(crate) struct Field(pub(crate) &'static str, pub(crate) Kind, pub(crate) Versions);

#[derive(Debug)]
pub(crate) enum Kind {
    Bool,
    I8,
    I16,
    I32,
    I64,
    Uuid,
    String,
    NullableString,
    Bytes,
    /// Arrays; null is malformed unless the name says otherwise.
    Int8s,
    Int32s,
    NullableInt32s,
    Strings,
    NullableStrings,
    Structs(&'static Message),
    NullableStructs(&'static Message),
    /// One nested struct, and one behind a presence byte.
    Struct(&'static Message),
    NullableStruct(&'static Message),
}

/// A request or a struct inside one.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) fields: &'static [Field],
    /// Known tagged fields; others are skipped.
    pub(crate) tagged: &'static [(u32, Field)],
}

/// What `kafka-protocol` keeps for a string or bytes: one `Bytes` handle into the frame.
pub(crate) const HANDLE_BYTES: usize = 32;
/// And for an array: a `Vec`.
const ARRAY_BYTES: usize = 24;
/// And in each struct for unknown tagged fields: an empty map, which owns no memory.
const TAG_MAP_BYTES: usize = 24;

impl Kind {
    const fn decoded_bytes(&self) -> usize {
        match self {
            Kind::Bool | Kind::I8 => 1,
            Kind::I16 => 2,
            Kind::I32 => 4,
            Kind::I64 => 8,
            Kind::Uuid => 16,
            Kind::String | Kind::NullableString | Kind::Bytes => HANDLE_BYTES,
            Kind::Int8s
            | Kind::Int32s
            | Kind::NullableInt32s
            | Kind::Strings
            | Kind::NullableStrings
            | Kind::Structs(_)
            | Kind::NullableStructs(_) => ARRAY_BYTES,
            Kind::Struct(message) => message.decoded_bytes(),
            Kind::NullableStruct(message) => 8 + message.decoded_bytes(),
        }
    }
}

impl Message {
    /// What one of these occupies after decoding, apart from what its arrays own. Fields of other versions count too:
    /// the generated struct has them all.
    pub(crate) const fn decoded_bytes(&self) -> usize {
        let mut sum = TAG_MAP_BYTES;
        let mut at = 0;
        while at < self.fields.len() {
            sum += self.fields[at].1.decoded_bytes();
            at += 1;
        }
        at = 0;
        while at < self.tagged.len() {
            sum += self.tagged[at].1.1.decoded_bytes();
            at += 1;
        }
        sum.next_multiple_of(8)
    }
}

/// The layout of a served request; `None` for Produce and for keys that are not served.
pub(crate) fn request(key: i16) -> Option<&'static Message> {
    Some(match key {
        api::FETCH => &data::FETCH,
        api::LIST_OFFSETS => &data::LIST_OFFSETS,
        api::METADATA => &data::METADATA,
        api::OFFSET_COMMIT => &groups::OFFSET_COMMIT,
        api::OFFSET_FETCH => &groups::OFFSET_FETCH,
        api::FIND_COORDINATOR => &groups::FIND_COORDINATOR,
        api::JOIN_GROUP => &groups::JOIN_GROUP,
        api::HEARTBEAT => &groups::HEARTBEAT,
        api::LEAVE_GROUP => &groups::LEAVE_GROUP,
        api::SYNC_GROUP => &groups::SYNC_GROUP,
        api::DESCRIBE_GROUPS => &groups::DESCRIBE_GROUPS,
        api::LIST_GROUPS => &groups::LIST_GROUPS,
        api::API_VERSIONS => &data::API_VERSIONS,
        api::CREATE_TOPICS => &admin::CREATE_TOPICS,
        api::DELETE_TOPICS => &admin::DELETE_TOPICS,
        api::DELETE_RECORDS => &data::DELETE_RECORDS,
        api::INIT_PRODUCER_ID => &data::INIT_PRODUCER_ID,
        api::OFFSET_FOR_LEADER_EPOCH => &data::OFFSET_FOR_LEADER_EPOCH,
        api::DESCRIBE_CONFIGS => &admin::DESCRIBE_CONFIGS,
        api::ALTER_CONFIGS => &admin::ALTER_CONFIGS,
        api::DESCRIBE_LOG_DIRS => &admin::DESCRIBE_LOG_DIRS,
        api::CREATE_PARTITIONS => &admin::CREATE_PARTITIONS,
        api::DELETE_GROUPS => &groups::DELETE_GROUPS,
        api::INCREMENTAL_ALTER_CONFIGS => &admin::INCREMENTAL_ALTER_CONFIGS,
        api::OFFSET_DELETE => &groups::OFFSET_DELETE,
        api::DESCRIBE_CLUSTER => &admin::DESCRIBE_CLUSTER,
        api::DESCRIBE_TOPIC_PARTITIONS => &admin::DESCRIBE_TOPIC_PARTITIONS,
        api::DESCRIBE_ACLS => &operations::DESCRIBE_ACLS,
        api::ELECT_LEADERS => &operations::ELECT_LEADERS,
        api::ALTER_PARTITION_REASSIGNMENTS => &operations::ALTER_PARTITION_REASSIGNMENTS,
        api::LIST_PARTITION_REASSIGNMENTS => &operations::LIST_PARTITION_REASSIGNMENTS,
        api::DESCRIBE_CLIENT_QUOTAS => &operations::DESCRIBE_CLIENT_QUOTAS,
        api::ALTER_CLIENT_QUOTAS => &operations::ALTER_CLIENT_QUOTAS,
        api::DESCRIBE_USER_SCRAM_CREDENTIALS => &operations::DESCRIBE_USER_SCRAM_CREDENTIALS,
        api::DESCRIBE_QUORUM => &operations::DESCRIBE_QUORUM,
        api::DESCRIBE_PRODUCERS => &operations::DESCRIBE_PRODUCERS,
        api::LIST_CONFIG_RESOURCES => &operations::LIST_CONFIG_RESOURCES,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kafka_protocol::messages as km;

    #[test]
    fn every_served_request_has_a_layout() {
        for spec in api::SERVED {
            assert_eq!(request(spec.key).is_some(), spec.key != api::PRODUCE, "{}", spec.name);
        }
    }

    /// The guard's memory bound rests on these estimates.
    #[test]
    fn decoded_sizes_are_not_underestimated() {
        fn check<T>(message: &Message) {
            let (actual, estimate) = (size_of::<T>(), message.decoded_bytes());
            assert!(
                actual <= estimate + estimate / 4,
                "{}: {actual} > {estimate}",
                std::any::type_name::<T>()
            );
        }
        fn element(message: &'static Message, field: &str) -> &'static Message {
            let field = message.fields.iter().find(|f| f.0 == field).expect("known field");
            match field.1 {
                Kind::Structs(inner) | Kind::NullableStructs(inner) => inner,
                _ => panic!("{} is not an array of structs", field.0),
            }
        }
        let fetch = request(api::FETCH).expect("served");
        check::<km::FetchRequest>(fetch);
        check::<km::fetch_request::FetchTopic>(element(fetch, "topics"));
        check::<km::fetch_request::FetchPartition>(element(element(fetch, "topics"), "partitions"));
        check::<km::fetch_request::ForgottenTopic>(element(fetch, "forgotten_topics_data"));
        let metadata = request(api::METADATA).expect("served");
        check::<km::metadata_request::MetadataRequestTopic>(element(metadata, "topics"));
        let commit = request(api::OFFSET_COMMIT).expect("served");
        check::<km::offset_commit_request::OffsetCommitRequestTopic>(element(commit, "topics"));
        let fetch = request(api::OFFSET_FETCH).expect("served");
        check::<km::offset_fetch_request::OffsetFetchRequestGroup>(element(fetch, "groups"));
        check::<km::offset_fetch_request::OffsetFetchRequestTopics>(element(
            element(fetch, "groups"),
            "topics",
        ));
        let create = request(api::CREATE_TOPICS).expect("served");
        check::<km::create_topics_request::CreatableTopic>(element(create, "topics"));
        check::<km::create_topics_request::CreatableTopicConfig>(element(
            element(create, "topics"),
            "configs",
        ));
        let delete = request(api::DELETE_TOPICS).expect("served");
        check::<km::delete_topics_request::DeleteTopicState>(element(delete, "topics"));
        let join = request(api::JOIN_GROUP).expect("served");
        check::<km::join_group_request::JoinGroupRequestProtocol>(element(join, "protocols"));
        let elect = request(api::ELECT_LEADERS).expect("served");
        check::<km::elect_leaders_request::TopicPartitions>(element(elect, "topic_partitions"));
        let reassign = request(api::ALTER_PARTITION_REASSIGNMENTS).expect("served");
        check::<km::alter_partition_reassignments_request::ReassignablePartition>(element(
            element(reassign, "topics"),
            "partitions",
        ));
        let quotas = request(api::ALTER_CLIENT_QUOTAS).expect("served");
        check::<km::alter_client_quotas_request::EntryData>(element(quotas, "entries"));
        check::<km::alter_client_quotas_request::OpData>(element(element(quotas, "entries"), "ops"));
        let quotas = request(api::DESCRIBE_CLIENT_QUOTAS).expect("served");
        check::<km::describe_client_quotas_request::ComponentData>(element(quotas, "components"));
    }
}
