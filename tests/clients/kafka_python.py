"""kafka-python against a broker: produce, consume, groups, admin. Usage: kafka_python.py BOOTSTRAP"""
import sys

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewPartitions, NewTopic
from kafka.structs import OffsetAndMetadata

bootstrap = sys.argv[1]
admin = KafkaAdminClient(bootstrap_servers=bootstrap)
admin.create_topics([NewTopic("py", num_partitions=3, replication_factor=1)])
assert "py" in admin.list_topics()

for codec in [None, "gzip", "snappy", "lz4", "zstd"]:
    producer = KafkaProducer(bootstrap_servers=bootstrap, compression_type=codec, acks="all")
    for i in range(100):
        producer.send("py", key=str(i).encode(), value=f"{codec}-{i}".encode(), headers=[("h", b"v")])
    producer.flush()
    producer.close()

consumer = KafkaConsumer("py", bootstrap_servers=bootstrap, group_id="g", auto_offset_reset="earliest", enable_auto_commit=False)
seen = []
while len(seen) < 500:
    for records in consumer.poll(timeout_ms=1000).values():
        seen.extend(records)
assert len(seen) == 500, len(seen)
assert {r.value.decode() for r in seen} == {f"{c}-{i}" for c in [None, "gzip", "snappy", "lz4", "zstd"] for i in range(100)}
assert all(list(r.headers) == [("h", b"v")] for r in seen)
consumer.commit()
committed = {p: consumer.committed(TopicPartition("py", p)) for p in range(3)}
assert sum(committed.values()) == 500, committed
consumer.commit({TopicPartition("py", 0): OffsetAndMetadata(7, "a note", -1)})
assert consumer.committed(TopicPartition("py", 0), metadata=True).metadata == "a note"
ends = consumer.end_offsets([TopicPartition("py", p) for p in range(3)])
starts = consumer.beginning_offsets([TopicPartition("py", p) for p in range(3)])
assert sum(ends.values()) == 500 and sum(starts.values()) == 0
first = min(r.timestamp for r in seen if r.partition == 0)
found = consumer.offsets_for_times({TopicPartition("py", 0): first})
assert found[TopicPartition("py", 0)].offset == 0, found
consumer.close()

admin.create_partitions({"py": NewPartitions(total_count=5)})
check = KafkaConsumer(bootstrap_servers=bootstrap)
assert check.partitions_for_topic("py") == set(range(5)), check.partitions_for_topic("py")
check.close()
admin.delete_topics(["py"])
admin.close()
print("kafka-python ok")
