#!/usr/bin/env bash
# Apache Kafka's tools for operators against a broker: quorum, elections, reassignments, directories, producers, every type
# of configuration, features. Usage: java_tools_operate.sh BOOTSTRAP
set -euo pipefail
bootstrap=$1 servers_first=yes
source "$(dirname "$0")/java_env.sh"
refused() { # class, arguments; prints what it said, and fails when it did not fail
  local class=$1
  shift
  if bash "$here/bench/kafka-tool.sh" "$class" --bootstrap-server "$bootstrap" "$@" >"$scratch/out" 2>&1 &&
    ! grep -qE 'Error|Exception' "$scratch/out"; then
    echo "$class $* was not refused:" >&2
    cat "$scratch/out" >&2
    return 1
  fi
  cat "$scratch/out"
}

tool $tools.TopicCommand --create --topic ops --partitions 2 >/dev/null
seq 1 100 | tool $tools.ConsoleProducer --topic ops >/dev/null

out=$(tool $tools.MetadataQuorumCommand describe --status)
expect "$out" '^LeaderId: +1$'
expect "$out" '^HighWatermark: +[1-9][0-9]*$'
expect "$out" '^MaxFollowerLag: +0$'
expect "$out" "^CurrentVoters: .*\"id\": 1.*${bootstrap}"
out=$(tool $tools.MetadataQuorumCommand describe --replication)
expect "$out" '^1 .*Leader'

out=$(tool $tools.LeaderElectionCommand --election-type preferred --all-topic-partitions)
[ -z "$out" ] || expect "$out" 'Valid replica already elected|not needed'
out=$(tool $tools.LeaderElectionCommand --election-type preferred --topic ops --partition 0)
expect "$out" 'Valid replica already elected for partitions ops-0|ElectionNotNeeded'

out=$(tool $tools.reassign.ReassignPartitionsCommand --list)
expect "$out" 'No partition reassignments found'
echo '{"version":1,"partitions":[{"topic":"ops","partition":0,"replicas":[1]},{"topic":"ops","partition":1,"replicas":[1]}]}' >"$scratch/same.json"
out=$(tool $tools.reassign.ReassignPartitionsCommand --reassignment-json-file "$scratch/same.json" --execute)
expect "$out" 'Successfully started partition reassignments for ops-0,ops-1'
out=$(tool $tools.reassign.ReassignPartitionsCommand --reassignment-json-file "$scratch/same.json" --verify)
expect "$out" 'Reassignment of partition ops-1 is completed'
out=$(tool $tools.reassign.ReassignPartitionsCommand --reassignment-json-file "$scratch/same.json" --cancel)
expect "$out" 'None of the specified partition moves are active'
echo '{"version":1,"partitions":[{"topic":"ops","partition":0,"replicas":[7]}]}' >"$scratch/other.json"
out=$(refused $tools.reassign.ReassignPartitionsCommand --reassignment-json-file "$scratch/other.json" --execute)
expect "$out" '7'
echo '{"topics":[{"topic":"ops"}],"version":1}' >"$scratch/topics.json"
out=$(tool $tools.reassign.ReassignPartitionsCommand --topics-to-move-json-file "$scratch/topics.json" --broker-list 1 --generate)
expect "$out" '"topic":"ops","partition":1,"replicas":\[1\]'

expect "$(tool $tools.LogDirsCommand --describe --broker-list 1)" '"partition":"ops-[01]"'
out=$(tool $tools.TransactionsCommand describe-producers --topic ops --partition 0)
expect "$out" '^ProducerId'
out=$(tool $tools.TransactionsCommand describe-producers --topic ops --partition 1)$out
expect "$out" '^[0-9]+ +	0 +	-1 '

for type in topics brokers clients users ips client-metrics; do
  tool kafka.admin.ConfigCommand --describe --entity-type $type >/dev/null
done
expect "$(tool kafka.admin.ConfigCommand --describe --entity-type broker-loggers --entity-name 1)" '^Dynamic configs for broker-logger 1 are:$'
out=$(tool kafka.admin.ConfigCommand --describe --entity-type client-metrics --entity-name none)
expect "$out" "^The client-metric 'none' doesn't exist"
out=$(tool kafka.admin.ConfigCommand --describe --entity-type users --entity-name ann)
[ -z "$out" ]
tool kafka.admin.ConfigCommand --alter --entity-type groups --entity-name g1 --add-config consumer.session.timeout.ms=50000 >/dev/null
expect "$(tool kafka.admin.ConfigCommand --describe --entity-type groups --entity-name g1)" '^  consumer.session.timeout.ms=50000 '
[ -z "$(tool $tools.ClientMetricsCommand --list)" ]
out=$(refused kafka.admin.ConfigCommand --alter --entity-type clients --entity-name c --add-config producer_byte_rate=1000)
expect "$out" 'Quotas are not enforced by this broker'

expect "$(tool $tools.FeatureCommand describe)" '^Feature: metadata.version .*FinalizedVersionLevel: 4.1-IV'
expect "$(refused $tools.AclCommand --list)" 'No Authorizer is configured'
tool $tools.TopicCommand --delete --topic ops >/dev/null
echo "java operator tools ok"
