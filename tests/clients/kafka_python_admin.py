"""kafka-python's administrative calls. Usage: kafka_python_admin.py BOOTSTRAP"""
import sys

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, NewPartitions, NewTopic, OffsetSpec
from kafka.errors import (
    GroupIdNotFoundError,
    InvalidPartitionsError,
    InvalidTopicError,
    MessageSizeTooLargeError,
    NoError,
    NonEmptyGroupError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
)
from kafka.structs import OffsetAndMetadata

bootstrap = sys.argv[1]
admin = KafkaAdminClient(bootstrap_servers=bootstrap)


def refused(error, call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except error:
        return
    raise AssertionError(f"{call.__name__} was not refused")


admin.create_topics([NewTopic("pa", num_partitions=2, replication_factor=1, topic_configs={"max.message.bytes": "10000"})])
refused(TopicAlreadyExistsError, admin.create_topics, [NewTopic("pa", num_partitions=1, replication_factor=1)])
refused(InvalidTopicError, admin.create_topics, [NewTopic("p a", num_partitions=1, replication_factor=1)])
admin.create_topics([NewTopic("pdry", num_partitions=1, replication_factor=1)], validate_only=True)
assert "pdry" not in admin.list_topics()
admin.create_partitions({"pa": NewPartitions(total_count=3)})
refused(InvalidPartitionsError, admin.create_partitions, {"pa": NewPartitions(total_count=2)})
topic = admin.describe_topics(["pa"])[0]
assert len(topic["partitions"]) == 3 and not topic["is_internal"], topic
page = admin.describe_topic_partitions(["pa"], response_partition_limit=2)
assert page["next_cursor"], page
rest = admin.describe_topic_partitions(["pa"], cursor=page["next_cursor"])
assert [p["partition_index"] for p in page["topics"][0]["partitions"] + rest["topics"][0]["partitions"]] == [0, 1, 2]
cluster = admin.describe_cluster()
assert [b.get("node_id", b.get("broker_id")) for b in cluster["brokers"]] == [1], cluster
assert admin.describe_log_dirs()
assert "metadata.version" in admin.describe_features()


def configs():
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, "pa")], config_filter="all")
    return next(iter(found.values()))["pa"]


assert configs()["max.message.bytes"]["value"] == "10000", configs()
admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, "pa", {"retention.ms": "3600000"})], incremental=True)
assert (configs()["retention.ms"]["value"], configs()["max.message.bytes"]["value"]) == ("3600000", "10000")
admin.reset_configs([ConfigResource(ConfigResourceType.TOPIC, "pa", ["retention.ms"])], incremental=True)
assert configs()["retention.ms"]["value"] == "604800000"

producer = KafkaProducer(bootstrap_servers=bootstrap, acks="all")
for i in range(50):
    producer.send("pa", b"v%d" % i, partition=0, timestamp_ms=1_700_000_000_000 + i)
producer.flush()
refused(MessageSizeTooLargeError, lambda: producer.send("pa", b"x" * 20_000, partition=0).get(30))
producer.close()

first = TopicPartition("pa", 0)


def offset(spec):
    return admin.list_partition_offsets({first: spec})[first].offset


assert (offset(OffsetSpec.EARLIEST), offset(OffsetSpec.LATEST)) == (0, 50)
assert offset(1_700_000_000_020) == 20
admin.delete_records({first: 10})
assert offset(OffsetSpec.EARLIEST) == 10

# Offsets of a group that nobody is in.
changed = admin.alter_group_offsets("pg", {first: OffsetAndMetadata(40, "set", -1), TopicPartition("pa", 1): OffsetAndMetadata(0, "", -1)})
assert set(changed.values()) == {NoError}, changed
stored = admin.list_group_offsets("pg")
stored = stored.get("pg", stored)
assert {p.partition: (o.offset, o.metadata) for p, o in stored.items() if o.offset >= 0} == {0: (40, "set"), 1: (0, "")}, stored
assert admin.delete_group_offsets("pg", [TopicPartition("pa", 1)]) == {TopicPartition("pa", 1): NoError}
missing = admin.delete_group_offsets("pg", [TopicPartition("pa", 9)])
assert missing == {TopicPartition("pa", 9): UnknownTopicOrPartitionError}, missing
reset = admin.reset_group_offsets("pg", {first: OffsetSpec.EARLIEST})
assert reset[first]["offset"] == 10, reset

# And of one with a member: it starts where the offset was set, and cannot be deleted.
consumer = KafkaConsumer("pa", bootstrap_servers=bootstrap, group_id="pg", client_id="inside", isolation_level="read_committed")
seen = []
while len(seen) < 40:
    for records in consumer.poll(timeout_ms=500).values():
        seen.extend(records)
assert [r.offset for r in seen] == list(range(10, 50))
described = admin.describe_groups(["pg"], include_authorized_operations=True)["pg"]
assert described["group_state"] == "Stable" and described["members"][0]["client_id"] == "inside", described
assert admin.delete_groups(["pg"]) == {"pg": NonEmptyGroupError.__name__}
consumer.close()
assert admin.describe_groups(["pg"])["pg"]["group_state"] == "Empty"
deleted = admin.delete_groups(["pg"])
assert list(deleted) == ["pg"] and "Error" not in str(deleted).replace("NoError", ""), deleted
assert admin.delete_groups(["pg"]) == {"pg": GroupIdNotFoundError.__name__}
admin.delete_topics(["pa"])
refused(UnknownTopicOrPartitionError, admin.delete_topics, ["pa"])
admin.close()
print("kafka-python admin ok")
