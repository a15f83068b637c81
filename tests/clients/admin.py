"""One administrative call by librdkafka, for tests written in Rust. Prints "ok", or "error NAME: message".

admin.py BOOTSTRAP configs TOPIC KEY=VALUE|KEY- ...     IncrementalAlterConfigs: set, or delete
admin.py BOOTSTRAP describe TOPIC                       KEY=VALUE lines of what is set on the topic
admin.py BOOTSTRAP offsets GROUP                        "PARTITION OFFSET" lines
admin.py BOOTSTRAP reset GROUP TOPIC PARTITION=OFFSET   AlterConsumerGroupOffsets
admin.py BOOTSTRAP groups                               names
admin.py BOOTSTRAP join GROUP TOPIC                     subscribe as a member
"""
import sys

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

bootstrap, command, *arguments = sys.argv[1:]
admin = AdminClient({"bootstrap.servers": bootstrap})


def one(futures):
    return list(futures.values())[0].result()


def configs(topic, *changes):
    entries = []
    for change in changes:
        key, _, value = change.partition("=")
        if change.endswith("-") and "=" not in change:
            entries.append(ConfigEntry(change[:-1], None, incremental_operation=AlterConfigOpType.DELETE))
        else:
            entries.append(ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET))
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=entries)
    one(admin.incremental_alter_configs([resource]))


def describe(topic):
    for name, entry in sorted(one(admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topic)])).items()):
        if entry.source == 1:
            print(f"{name}={'(hidden)' if entry.is_sensitive else entry.value}")


def offsets(group):
    found = one(admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)]))
    for partition in found.topic_partitions:
        print(partition.partition, partition.offset)


def reset(group, topic, *positions):
    pairs = [position.split("=") for position in positions]
    partitions = [TopicPartition(topic, int(p), int(o)) for p, o in pairs]
    answer = one(admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, partitions)]))
    for partition in answer.topic_partitions:
        if partition.error:
            raise KafkaException(partition.error)


def groups():
    for group in admin.list_consumer_groups().result().valid:
        print(group.group_id)


def join(group, topic):
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "session.timeout.ms": 6000})
    consumer.subscribe([topic])
    while True:
        message = consumer.poll(1.0)
        if message is not None and message.error():
            raise KafkaException(message.error())


try:
    {"configs": configs, "describe": describe, "offsets": offsets, "reset": reset, "groups": groups, "join": join}[command](
        *arguments
    )
    print("ok")
except KafkaException as exception:
    error = exception.args[0]
    print(f"error {error.name()}: {error.str()}")
