#!/usr/bin/env bash
# Runs other people's test suites against a broker of this repository and compares with what Apache Kafka passes.
#   run.sh [--against kafka] [SUITE]...
# Suites: franz-go rust-rdkafka rust-rskafka librdkafka librdkafka.idempotent librdkafka.noautocreate librdkafka.consumer
# (all of them without a name). Each gets a fresh broker on free ports of loopback. Sources, builds, results and logs lie
# in .cache/conformance. A failure that nobody expected is run once more, alone, before it is believed: these tests
# have time limits. Ends with status 1 when a test fails that Kafka passes and SUITE.expected-fail.tsv does not name.
set -euo pipefail
. "$(dirname "$0")/env.sh"

results_dir=$cache_dir/results
mkdir -p "$results_dir"
against=flumen
suites=()
while [ $# -gt 0 ]; do
    case $1 in
        --against) against=$2; shift 2 ;;
        -h | --help) sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
        *) suites+=("$1"); shift ;;
    esac
done
if [ ${#suites[@]} -eq 0 ]; then
    suites=(franz-go rust-rdkafka rust-rskafka librdkafka librdkafka.idempotent librdkafka.noautocreate librdkafka.consumer)
fi
flumen=${FLUMEN_BIN:-$repository/target/release/flumen}
[ "$against" != flumen ] || [ -x "$flumen" ] || suite_fail "$flumen is missing: build it, or set FLUMEN_BIN"

free_port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }

broker_pid="" broker_data="" address=""

start_broker() {
    local settings=() setting arguments=()
    mapfile -t settings < <(bash "$script" settings "$against")
    broker_data=$(mktemp -d "${TMPDIR:-/tmp}/conformance.XXXXXX")
    local port admin
    port=${CONFORMANCE_PORT:-$(free_port)}
    admin=${CONFORMANCE_ADMIN_PORT:-$(free_port)}
    address=127.0.0.1:$port
    if [ "$against" = kafka ]; then
        for setting in "${settings[@]}"; do
            case $setting in
                node.id=*) arguments+=(--node-id "${setting#node.id=}") ;;
                *) arguments+=(--set "$setting") ;;
            esac
        done
        bash "$repository/bench/kafka.sh" start --port "$port" --data "$broker_data" "${arguments[@]}"
        return
    fi
    for setting in "${settings[@]}"; do arguments+=(--set "$setting"); done
    "$flumen" server --data-dir "$broker_data/data" --kafka "$address" --admin "127.0.0.1:$admin" "${arguments[@]}" \
        >"$broker_data/out" 2>"$results_dir/$suite.broker.log" </dev/null &
    broker_pid=$!
    await_ready "$broker_data/out" "$broker_pid" "$results_dir/$suite.broker.log"
}

stop_broker() {
    if [ "$against" = kafka ] && [ -n "$broker_data" ]; then bash "$repository/bench/kafka.sh" stop "$broker_data" || true; fi
    if [ -n "$broker_pid" ]; then kill "$broker_pid" 2>/dev/null && wait "$broker_pid" || true; fi
    [ -z "$broker_data" ] || rm -rf "$broker_data"
    broker_pid="" broker_data=""
}
trap stop_broker EXIT

# What a suite takes to run one of its tests alone.
alone() {
    case $suite in
        franz-go) echo "^${1%%/*}\$" ;;
        librdkafka*) case $1 in */*) echo "${1%%_*}:${1#*/}" ;; *) echo "${1%%_*}" ;; esac ;;
        *) echo "${1#*::}" ;;
    esac
}

failed=()
for suite in "${suites[@]}"; do
    script=$conformance_dir/${suite%%.*}.sh
    [ -f "$script" ] || suite_fail "there is no suite $suite"
    export LIBRDKAFKA_MODE=${suite#librdkafka}
    LIBRDKAFKA_MODE=${LIBRDKAFKA_MODE#.}
    [ -n "$LIBRDKAFKA_MODE" ] && [ "$LIBRDKAFKA_MODE" != "$suite" ] || LIBRDKAFKA_MODE=default
    compare=(python3 "$conformance_dir/compare.py" "$suite" "$against")
    if [ "$against" = flumen ] && reason=$("${compare[@]}" not-served); then
        echo "== $suite: left out: $reason"
        continue
    fi
    echo "== $suite against $against"
    out=$results_dir/$suite.$against.tsv
    bash "$script" fetch
    start_broker
    FRANZ_GO_SKIP=$("${compare[@]}" skip-pattern) bash "$script" run "$address" "$out" >"$results_dir/$suite.run.log" 2>&1
    mapfile -t again < <("${compare[@]}" unexpected "$out")
    for test in ${again[@]+"${again[@]}"}; do
        echo "   once more, alone: $test"
        bash "$script" run "$address" "$out.again" "$(alone "$test")" >>"$results_dir/$suite.run.log" 2>&1
        "${compare[@]}" merge "$out" "$out.again"
    done
    stop_broker
    "${compare[@]}" report "$out" || failed+=("$suite")
done
[ ${#failed[@]} -eq 0 ] || { echo "not as expected: ${failed[*]}"; exit 1; }
