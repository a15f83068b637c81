#!/usr/bin/env bash
# More of Apache Kafka's own tools against a broker: whatever they say must be what they say of Kafka, without a warning.
# Usage: java_tools_admin.sh BOOTSTRAP
set -euo pipefail
bootstrap=$1 servers_first=no
source "$(dirname "$0")/java_env.sh"

expect "$(tool $tools.TopicCommand --create --topic more --partitions 2 --config max.message.bytes=3000000)" '^Created topic more\.$'
out=$(tool $tools.TopicCommand --describe --topic more)
expect "$out" 'PartitionCount: 2	ReplicationFactor: 1	Configs: max.message.bytes=3000000$'
expect "$out" 'Partition: 1	Leader: 1	Replicas: 1	Isr: 1	Elr: 	LastKnownElr: $'
[ -z "$(tool $tools.TopicCommand --describe --under-replicated-partitions)" ]
[ -z "$(tool $tools.TopicCommand --describe --unavailable-partitions)" ]

# Records of 2 MB, each codec, and what a consumer sees of them at both isolation levels.
for codec in gzip snappy lz4 zstd; do
  tool $tools.ProducerPerformance --topic more --num-records 5 --record-size 2000000 --throughput -1 \
    --command-property max.request.size=3000000 compression.type=$codec acks=all buffer.memory=67108864 >/dev/null
done
out=$(tool $tools.VerifiableConsumer --topic more --group-id vg --max-messages 20 --reset-policy earliest \
  --assignment-strategy org.apache.kafka.clients.consumer.CooperativeStickyAssignor)
expect "$out" '"name":"partitions_assigned"'
expect "$out" '"name":"shutdown_complete"'
out=$(tool $tools.GetOffsetShell --topic more --time latest)
[ "$(awk -F: '{s += $3} END {print s}' <<<"$out")" = 20 ]

out=$(tool $tools.consumer.group.ConsumerGroupCommand --describe --group vg --state)
expect "$out" '^vg .* Empty +0 *$'
out=$(tool $tools.consumer.group.ConsumerGroupCommand --describe --group vg)
[ "$(awk '$2 == "more" {lag += $6} END {print lag + 0}' <<<"$out")" = 0 ]
out=$(tool $tools.consumer.group.ConsumerGroupCommand --delete-offsets --group vg --topic more)
[ "$(grep -c 'Successful' <<<"$out")" = 2 ]
expect "$(tool $tools.consumer.group.ConsumerGroupCommand --delete --group vg)" "\('vg'\) was successful"
[ -z "$(tool $tools.GroupsCommand --list | grep '^vg' || true)" ]

echo '{"partitions":[{"topic":"more","partition":0,"offset":-1},{"topic":"more","partition":1,"offset":-1}],"version":1}' >"$scratch/offsets.json"
out=$(tool $tools.DeleteRecordsCommand --offset-json-file "$scratch/offsets.json")
[ "$(awk '/low_watermark/ {s += $NF} END {print s}' <<<"$out")" = 20 ]
out=$(tool $tools.GetOffsetShell --topic more --time earliest)
[ "$(awk -F: '{s += $3} END {print s}' <<<"$out")" = 20 ]

expect "$(tool $tools.LogDirsCommand --describe --topic-list more)" '"partition":"more-[01]".*"error":null'
expect "$(tool $tools.ClusterTool cluster-id)" '^Cluster ID: [A-Za-z0-9_-]{22}$'
out=$(tool $tools.BrokerApiVersionsCommand)
expect "$out" 'Produce\(0\): 0 to 13 \[usable: 13\]'
tool kafka.admin.ConfigCommand --alter --entity-type brokers --entity-default --add-config log.retention.ms=100000 >/dev/null
out=$(tool kafka.admin.ConfigCommand --describe --entity-type brokers --entity-default)
expect "$out" '^  log.retention.ms=100000 sensitive=false synonyms=\{DYNAMIC_DEFAULT_BROKER_CONFIG:log.retention.ms=100000\}$'
tool kafka.admin.ConfigCommand --alter --entity-type brokers --entity-default --delete-config log.retention.ms >/dev/null
out=$(tool kafka.admin.ConfigCommand --describe --entity-type topics --entity-name more --all)
expect "$out" '^  retention.ms=604800000 sensitive=false synonyms=\{\}$'
expect "$out" '^  max.message.bytes=3000000 sensitive=false synonyms=\{DYNAMIC_TOPIC_CONFIG:max.message.bytes=3000000, DEFAULT_CONFIG:message.max.bytes=1048588\}$'
tool $tools.TopicCommand --delete --topic more
echo "java admin tools ok"
