"""What librdkafka's admin client asks for an operator: elections, credentials, ACLs. Usage: confluent_operate.py BOOTSTRAP"""

import sys

from confluent_kafka import ElectionType, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

admin = AdminClient({"bootstrap.servers": sys.argv[1]})
admin.create_topics([NewTopic("operate", num_partitions=2)])["operate"].result()

elected = admin.elect_leaders(ElectionType.PREFERRED, [TopicPartition("operate", 0), TopicPartition("operate", 9)]).result()
codes = {place.partition: error.code() if error else 0 for place, error in elected.items()}
assert codes == {0: KafkaError.ELECTION_NOT_NEEDED, 9: KafkaError.UNKNOWN_TOPIC_OR_PART}, codes

assert admin.describe_user_scram_credentials().result() == {}
try:
    admin.describe_user_scram_credentials(["ann"])["ann"].result()
    raise AssertionError("a credential was found")
except KafkaException as e:
    assert e.args[0].code() == KafkaError.RESOURCE_NOT_FOUND, e

every = AclBindingFilter(
    ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ANY
)
# Of an answer with SECURITY_DISABLED, Kafka's or ours, this client shows that there are none.
assert admin.describe_acls(every).result() == []

print("confluent operate ok")
