#!/usr/bin/env bash
# The scripts' classes of Apache Kafka itself against a broker. Usage: java_tools.sh BOOTSTRAP
set -euo pipefail
bootstrap=$1
here=$(cd "$(dirname "$0")/../.." && pwd)
tool() { bash "$here/bench/kafka-tool.sh" "$@"; }
expect() { # text, pattern
  grep -qE -- "$2" <<<"$1" || { echo "expected /$2/ in:" >&2; echo "$1" >&2; exit 1; }
}

tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$bootstrap" --create --topic java --partitions 2 --replication-factor 1 --config retention.ms=100000
out=$(tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$bootstrap" --describe --topic java)
expect "$out" 'PartitionCount: 2'
expect "$out" 'retention.ms=100000'
tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$bootstrap" --alter --topic java --partitions 3
out=$(tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$bootstrap" --list)
expect "$out" '^java$'

seq 1 1000 | awk '{print "k" $1 ":v" $1}' | tool org.apache.kafka.tools.ConsoleProducer --bootstrap-server "$bootstrap" --topic java --property parse.key=true --property key.separator=:
out=$(tool org.apache.kafka.tools.consumer.ConsoleConsumer --bootstrap-server "$bootstrap" --topic java --from-beginning --max-messages 1000 --group jg | sort | uniq | wc -l)
expect "$out" '^ *1000$'

out=$(tool org.apache.kafka.tools.GetOffsetShell --bootstrap-server "$bootstrap" --topic java | awk -F: '{s += $3} END {print s}')
expect "$out" '^1000$'

tool kafka.admin.ConfigCommand --bootstrap-server "$bootstrap" --alter --entity-type topics --entity-name java --add-config retention.ms=200000 2>/dev/null ||
  tool org.apache.kafka.tools.ConfigCommand --bootstrap-server "$bootstrap" --alter --entity-type topics --entity-name java --add-config retention.ms=200000
out=$(tool kafka.admin.ConfigCommand --bootstrap-server "$bootstrap" --describe --entity-type topics --entity-name java 2>/dev/null ||
  tool org.apache.kafka.tools.ConfigCommand --bootstrap-server "$bootstrap" --describe --entity-type topics --entity-name java)
expect "$out" 'retention.ms=200000'

groups=org.apache.kafka.tools.consumer.group.ConsumerGroupCommand
out=$(tool $groups --bootstrap-server "$bootstrap" --list)
expect "$out" '^jg$'
out=$(tool $groups --bootstrap-server "$bootstrap" --describe --group jg 2>&1)
expect "$out" 'java'
tool $groups --bootstrap-server "$bootstrap" --reset-offsets --group jg --topic java --to-earliest --execute >/dev/null
out=$(tool $groups --bootstrap-server "$bootstrap" --describe --group jg 2>&1 | awk '$2 == "java" {lag += $6} END {print lag}')
expect "$out" '^1000$'
tool $groups --bootstrap-server "$bootstrap" --delete --group jg >/dev/null
tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$bootstrap" --delete --topic java
echo "java tools ok"
