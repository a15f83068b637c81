"""confluent-kafka (librdkafka) against a broker. Usage: confluent.py BOOTSTRAP"""
import sys

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic

bootstrap = sys.argv[1]
admin = AdminClient({"bootstrap.servers": bootstrap})
for future in admin.create_topics([NewTopic("cf", 4, 1, config={"retention.ms": "3600000"})]).values():
    future.result()

resource = ConfigResource(ConfigResource.Type.TOPIC, "cf")
config = list(admin.describe_configs([resource]).values())[0].result()
assert config["retention.ms"].value == "3600000"
assert config["cleanup.policy"].value == "delete"
assert "min.insync.replicas" in config
change = ConfigResource(
    ConfigResource.Type.TOPIC,
    "cf",
    incremental_configs=[ConfigEntry("retention.ms", "7200000", incremental_operation=AlterConfigOpType.SET)],
)
list(admin.incremental_alter_configs([change]).values())[0].result()
config = list(admin.describe_configs([resource]).values())[0].result()
assert config["retention.ms"].value == "7200000"

errors = []
producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 2, "compression.type": "lz4"})
for i in range(20000):
    producer.produce("cf", key=str(i % 97), value=f"v{i}", on_delivery=lambda e, m: errors.append(e) if e else None)
    producer.poll(0)
producer.flush()
assert not errors, errors[:3]

# Two consumers share a group; together they see everything once, in order per partition.
consumers = [
    Consumer({"bootstrap.servers": bootstrap, "group.id": "cg", "auto.offset.reset": "earliest", "client.id": f"c{i}"})
    for i in range(2)
]
for consumer in consumers:
    consumer.subscribe(["cf"])
seen = {}
while len(seen) < 20000:
    for consumer in consumers:
        for message in consumer.consume(500, timeout=0.2):
            assert not message.error(), message.error()
            seen[(message.partition(), message.offset())] = message.value()
assert len(set(seen.values())) == 20000
for consumer in consumers:
    try:
        consumer.commit(asynchronous=False)
    except KafkaException as error:
        # The automatic commit was faster.
        assert error.args[0].code() == KafkaError._NO_OFFSET, error

groups = admin.list_consumer_groups().result()
assert "cg" in [g.group_id for g in groups.valid]
described = admin.describe_consumer_groups(["cg"])["cg"].result()
assert described.state.name == "STABLE" and len(described.members) == 2, described.state
for consumer in consumers:
    consumer.close()
offsets = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions("cg")])["cg"].result()
assert sum(p.offset for p in offsets.topic_partitions) == 20000

consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "w"})
for partition in range(4):
    low, high = consumer.get_watermark_offsets(TopicPartition("cf", partition))
    assert low == 0 and high > 0
consumer.close()
list(admin.delete_consumer_groups(["cg"]).values())[0].result()
list(admin.delete_topics(["cf"]).values())[0].result()
print("confluent-kafka ok")
