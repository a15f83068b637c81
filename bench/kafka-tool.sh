#!/usr/bin/env bash
# Runs one class from Apache Kafka's own jars: kafka-tool.sh CLASS [args...]
#   kafka-tool.sh org.apache.kafka.tools.TopicCommand --bootstrap-server 127.0.0.1:9092 --list
# A short tool spends its time in start-up, so the JVM is kept small and stays in its first compiler.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/kafka-env.sh"

[ $# -ge 1 ] || kafka_fail "usage: kafka-tool.sh CLASS [args...]"
kafka_fetch
class=$1
shift
# shellcheck disable=SC2086
exec "$java" ${KAFKA_TOOL_OPTS:--Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1} \
    -Dlog4j2.configurationFile="$bench_dir/kafka/log4j2.xml" -cp "$kafka_dir/libs/*" "$class" "$@"
