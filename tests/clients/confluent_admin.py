"""confluent-kafka's administrative calls beyond making and dropping. Usage: confluent_admin.py BOOTSTRAP"""
import sys

from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Consumer, ConsumerGroupState, TopicCollection
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    OffsetSpec,
)

bootstrap = sys.argv[1]
admin = AdminClient({"bootstrap.servers": bootstrap})


def one(futures):
    return list(futures.values())[0].result()


def refused(futures):
    try:
        one(futures)
    except KafkaException as exception:
        return exception.args[0].name()
    raise AssertionError("was not refused")


one(admin.create_topics([NewTopic("ca", 2, 1)]))
assert refused(admin.create_topics([NewTopic("ca", 2, 1)])) == "TOPIC_ALREADY_EXISTS"
assert refused(admin.create_topics([NewTopic("ca3", 1, 3)])) == "INVALID_REPLICATION_FACTOR"
assert refused(admin.create_topics([NewTopic("ca p", 1, 1)])) == "TOPIC_EXCEPTION"
assert refused(admin.create_topics([NewTopic("cac", 1, 1, config={"retention.ms": "soon"})])) == "INVALID_CONFIG"
assert one(admin.create_topics([NewTopic("dry", 1, 1)], validate_only=True)) is None
assert "dry" not in admin.list_topics().topics
one(admin.create_partitions([NewPartitions("ca", 3)]))
assert refused(admin.create_partitions([NewPartitions("ca", 3)])) == "INVALID_PARTITIONS"
assert refused(admin.delete_topics(["nothing"])) == "UNKNOWN_TOPIC_OR_PART"

described = one(admin.describe_topics(TopicCollection(["ca"]), include_authorized_operations=True))
assert [p.leader.id for p in described.partitions] == [1, 1, 1] and not described.is_internal
assert described.authorized_operations
cluster = admin.describe_cluster(include_authorized_operations=True).result()
assert [n.id for n in cluster.nodes] == [1] and cluster.controller.id == 1 and cluster.authorized_operations

# Configurations: set, append, subtract, delete; the older call replaces all of them.
resource = ConfigResource(ConfigResource.Type.TOPIC, "ca")


def change(*entries):
    one(admin.incremental_alter_configs([ConfigResource(ConfigResource.Type.TOPIC, "ca", incremental_configs=list(entries))]))
    return one(admin.describe_configs([resource]))


found = change(
    ConfigEntry("cleanup.policy", "compact", incremental_operation=AlterConfigOpType.APPEND),
    ConfigEntry("retention.ms", "1000000", incremental_operation=AlterConfigOpType.SET),
)
assert found["cleanup.policy"].value == "delete,compact" and found["retention.ms"].source == 1
found = change(
    ConfigEntry("cleanup.policy", "compact", incremental_operation=AlterConfigOpType.SUBTRACT),
    ConfigEntry("retention.ms", None, incremental_operation=AlterConfigOpType.DELETE),
)
assert found["cleanup.policy"].value == "delete" and found["retention.ms"].source == 5
one(admin.alter_configs([ConfigResource(ConfigResource.Type.TOPIC, "ca", set_config={"segment.ms": "60000000"})]))
found = one(admin.describe_configs([resource]))
assert found["segment.ms"].value == "60000000" and found["cleanup.policy"].source == 5
broker = one(admin.describe_configs([ConfigResource(ConfigResource.Type.BROKER, "1")]))
assert broker["node.id"].is_read_only and broker["message.max.bytes"].value == "1048588"

# Offsets by every question that there is.
errors = []
producer = Producer({"bootstrap.servers": bootstrap})
for i in range(100):
    producer.produce("ca", f"v{i}", partition=0, timestamp=1_700_000_000_000 + i, on_delivery=lambda e, m: errors.append(e) if e else None)
producer.flush()
assert not errors, errors[:3]
first = TopicPartition("ca", 0)


def offset(spec, level=IsolationLevel.READ_UNCOMMITTED):
    found = one(admin.list_offsets({first: spec}, isolation_level=level))
    return found.offset, found.timestamp


assert offset(OffsetSpec.earliest()) == (0, -1)
assert offset(OffsetSpec.latest()) == (100, -1)
assert offset(OffsetSpec.latest(), IsolationLevel.READ_COMMITTED) == (100, -1)
assert offset(OffsetSpec.max_timestamp()) == (99, 1_700_000_000_099)
assert offset(OffsetSpec.for_timestamp(1_700_000_000_040)) == (40, 1_700_000_000_040)
assert offset(OffsetSpec.for_timestamp(1_800_000_000_000)) == (-1, -1)

# Records before an offset go; what is before that cannot be asked for.
assert one(admin.delete_records([TopicPartition("ca", 0, 30)])).low_watermark == 30
assert offset(OffsetSpec.earliest())[0] == 30
assert refused(admin.delete_records([TopicPartition("ca", 0, 101)])) == "OFFSET_OUT_OF_RANGE"
assert one(admin.delete_records([TopicPartition("ca", 0, -1)])).low_watermark == 100

# A group's offsets: set from outside, read, and refused while somebody is in it.
one(admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions("cag", [TopicPartition("ca", 0, 100), TopicPartition("ca", 1, 0)])]))
stored = one(admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions("cag")]))
assert sorted((p.partition, p.offset) for p in stored.topic_partitions) == [(0, 100), (1, 0)]
missing = one(admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions("cag", [TopicPartition("ca", 2)])]))
assert missing.topic_partitions[0].offset == -1001
consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "cag", "client.id": "inside"})
consumer.subscribe(["ca"])
while not consumer.assignment():
    consumer.poll(0.1)
assert one(admin.describe_consumer_groups(["cag"])).state == ConsumerGroupState.STABLE
assert [g.group_id for g in admin.list_consumer_groups(states={ConsumerGroupState.STABLE}).result().valid] == ["cag"]
assert refused(admin.delete_consumer_groups(["cag"])) == "NON_EMPTY_GROUP"
reset = one(admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions("cag", [TopicPartition("ca", 0, 50)])]))
assert reset.topic_partitions[0].error.code() == KafkaError.UNKNOWN_MEMBER_ID, reset.topic_partitions
consumer.close()
assert one(admin.describe_consumer_groups(["cag"])).state == ConsumerGroupState.EMPTY
one(admin.delete_consumer_groups(["cag"]))
assert refused(admin.delete_consumer_groups(["cag"])) == "GROUP_ID_NOT_FOUND"
one(admin.delete_topics(["ca"]))
print("confluent admin ok")
