#!/usr/bin/env bash
# Asks Flumen and Apache Kafka the same single questions (flumen-probe) and prints where the answers differ.
#   differential.sh                   compare whole answers; status 1 when one differs that differential.expected.tsv does not name
#   differential.sh --record-codes    write Kafka's error codes into versions.kafka.tsv, which tests/versions.rs compares with
# Both brokers are fresh, on free ports of loopback. Answers and differences stay in .cache/conformance/results.
set -euo pipefail
. "$(dirname "$0")/env.sh"

results_dir=$cache_dir/results
mkdir -p "$results_dir"
flumen=${FLUMEN_BIN:-$repository/target/release/flumen}
probe=${FLUMEN_PROBE:-$repository/target/release/flumen-probe}
[ -x "$flumen" ] || suite_fail "$flumen is missing: build it, or set FLUMEN_BIN"
[ -x "$probe" ] || suite_fail "$probe is missing: build it, or set FLUMEN_PROBE"

# What bench/kafka.sh sets besides, where it shows in an answer.
settings=(group.initial.rebalance.delay.ms=0 auto.create.topics.enable=true num.partitions=1 compression.type=producer)
arguments=()
for setting in "${settings[@]}"; do arguments+=(--set "$setting"); done

free_port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
scratch=$(mktemp -d "${TMPDIR:-/tmp}/differential.XXXXXX")
flumen_pid=""
stop() {
    bash "$repository/bench/kafka.sh" stop "$scratch/kafka" 2>/dev/null || true
    if [ -n "$flumen_pid" ]; then kill "$flumen_pid" 2>/dev/null && wait "$flumen_pid" || true; fi
    rm -rf "$scratch"
}
trap stop EXIT

kafka_port=${CONFORMANCE_KAFKA_PORT:-$(free_port)}
bash "$repository/bench/kafka.sh" start --port "$kafka_port" --data "$scratch/kafka" "${arguments[@]}"
if [ "${1:-}" = --record-codes ]; then
    "$probe" "127.0.0.1:$kafka_port" --codes >"$scratch/codes"
    { echo "# What Apache Kafka 4.3.1 answers to each probe: probe, versions, error codes. Written by differential.sh --record-codes."
        cat "$scratch/codes"; } >"$conformance_dir/versions.kafka.tsv"
    wc -l <"$conformance_dir/versions.kafka.tsv"
    exit 0
fi
"$probe" "127.0.0.1:$kafka_port" >"$results_dir/kafka.answers"

flumen_port=${CONFORMANCE_PORT:-$(free_port)}
"$flumen" server --data-dir "$scratch/flumen" --kafka "127.0.0.1:$flumen_port" \
    --admin "127.0.0.1:${CONFORMANCE_ADMIN_PORT:-$(free_port)}" "${arguments[@]}" \
    >"$scratch/out" 2>"$results_dir/differential.broker.log" </dev/null &
flumen_pid=$!
await_ready "$scratch/out" "$flumen_pid" "$results_dir/differential.broker.log"
"$probe" "127.0.0.1:$flumen_port" >"$results_dir/flumen.answers"
python3 "$conformance_dir/differential.py" "$results_dir/kafka.answers" "$results_dir/flumen.answers" \
    "$conformance_dir/differential.expected.tsv" | tee "$results_dir/differential.txt"
