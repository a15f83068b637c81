"""kafka-python's calls for operators: quorum, elections, reassignments, producers. Usage: kafka_python_operate.py BOOTSTRAP"""
import sys

from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

bootstrap = sys.argv[1]
admin = KafkaAdminClient(bootstrap_servers=bootstrap)
admin.create_topics([NewTopic("po", num_partitions=2, replication_factor=1)])
producer = KafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True)
for _ in range(3):
    producer.send("po", b"v", partition=0).get()

[topic] = admin.describe_metadata_quorum()["topics"]
[partition] = topic["partitions"]
assert partition["leader_id"] == 1 and partition["high_watermark"] > 0, partition
assert [voter["replica_id"] for voter in partition["current_voters"]] == [1], partition

elected = admin.elect_leaders(0, {"po": [0, 9]}, raise_errors=False)
[result] = elected.replica_election_results
assert [(p.partition_id, p.error_code) for p in result.partition_result] == [(0, 84), (9, 3)], elected

assert admin.list_partition_reassignments() == {}
place = TopicPartition("po", 0)
assert admin.alter_partition_reassignments({place: [1]}) == {place: None}
elsewhere = admin.alter_partition_reassignments({place: [7]})
assert "InvalidReplicationAssignment" in repr(elsewhere[place]), elsewhere

[state] = admin.describe_producers([place])[place].active_producers
assert (state.producer_epoch, state.last_sequence, state.current_transaction_start_offset) == (0, 2, -1), state

resources = admin.list_config_resources()
assert "po" in resources["topic"] and resources["broker"] == ["1"], resources
assert admin.describe_user_scram_credentials() == {}
producer.close()
admin.close()
print("kafka-python operate ok")
