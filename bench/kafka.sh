#!/usr/bin/env bash
# Apache Kafka, one node, as the peer of a measurement.
#   kafka.sh fetch                        get the jars (Maven, once, into .cache/kafka)
#   kafka.sh start [--port N] [--data DIR] [--node-id N] [--controller PORT] [--cluster-id ID] [--set key=value]...   prints "pid=N kafka=HOST:PORT took=SECONDS data=DIR"
#   kafka.sh run [same arguments]         become the broker: prints "launching kafka=HOST:PORT", logs to DIR/server.log
#   kafka.sh stop DIR                     stop the node of that data directory
#   kafka.sh kill DIR                     the same with -9
# Settings are Kafka's best found for a small machine, not its defaults: one log directory, network and I/O threads
# for two cores, socket buffers of 1 MiB, no forced flush. Heap and collector are those of the shipped start script.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/kafka-env.sh"

# A port is asked for only when none is given; Kafka needs two, and the second must be known before it starts.
free_port() {
    python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])' 2>/dev/null \
        || echo $((20000 + RANDOM % 10000))
}

port="" data="" node_id=1 controller="" cluster_id="" format_began="" launch=()

# Reads the arguments, writes the properties, formats the directory, and leaves the command in `launch`.
prepare() {
    local sets=()
    while [ $# -gt 0 ]; do
        case $1 in
            --port) port=$2; shift 2 ;;
            --data) data=$2; shift 2 ;;
            --node-id) node_id=$2; shift 2 ;;
            --controller) controller=$2; shift 2 ;;
            --cluster-id) cluster_id=$2; shift 2 ;;
            --set) sets+=("$2"); shift 2 ;;
            *) kafka_fail "unknown argument $1" ;;
        esac
    done
    kafka_fetch
    [ -n "$port" ] || port=$(free_port)
    [ -n "$data" ] || data=$(mktemp -d "${TMPDIR:-/tmp}/kafka-peer.XXXXXX")
    mkdir -p "$data"
    [ -n "$controller" ] || controller=$(free_port)
    {
        cat <<P
process.roles=broker,controller
node.id=$node_id
controller.quorum.voters=$node_id@127.0.0.1:$controller
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller
advertised.listeners=PLAINTEXT://127.0.0.1:$port
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$data/logs
num.network.threads=2
num.io.threads=4
socket.send.buffer.bytes=1048576
socket.receive.buffer.bytes=1048576
auto.create.topics.enable=false
compression.type=producer
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
P
        # Later lines win in a properties file, so a --set overrides what stands above.
        for s in ${sets[@]+"${sets[@]}"}; do echo "$s"; done
    } >"$data/server.properties"

    local cp="$kafka_dir/libs/*" log="-Dlog4j2.configurationFile=$bench_dir/kafka/log4j2.xml"
    format_began=$(date +%s.%N)
    if [ ! -f "$data/logs/meta.properties" ]; then
        [ -n "$cluster_id" ] || cluster_id=$("$java" "$log" -cp "$cp" kafka.tools.StorageTool random-uuid)
        "$java" "$log" -cp "$cp" kafka.tools.StorageTool format -t "$cluster_id" -c "$data/server.properties" \
            >"$data/format.log" 2>&1 || { cat "$data/format.log" >&2; kafka_fail "format failed"; }
    fi
    # shellcheck disable=SC2206
    launch=("$java" ${KAFKA_HEAP_OPTS:--Xms1g -Xmx1g} -server -XX:+UseG1GC -XX:MaxGCPauseMillis=20
        -XX:InitiatingHeapOccupancyPercent=35 -XX:+ExplicitGCInvokesConcurrent -Djava.awt.headless=true
        "$log" -cp "$cp" kafka.Kafka "$data/server.properties")
}

# In the foreground and under the caller's own process id, for a caller that wants to be its parent.
run() {
    prepare "$@"
    echo "launching kafka=127.0.0.1:$port data=$data"
    exec "${launch[@]}" >"$data/server.log" 2>&1 </dev/null
}

start() {
    prepare "$@"
    local launched
    launched=$(date +%s.%N)
    setsid "${launch[@]}" >"$data/server.log" 2>&1 </dev/null &
    local pid=$!
    echo "$pid" >"$data/pid"
    # Ready means a whole Kafka answer, not an open port; bounded so that a broken node is reported, not waited for.
    local tries=0
    until answers "$port"; do
        kill -0 "$pid" 2>/dev/null || { tail -30 "$data/server.log" >&2; kafka_fail "Kafka exited while starting"; }
        tries=$((tries + 1))
        [ "$tries" -lt 2400 ] || { kill -9 "$pid"; kafka_fail "Kafka did not answer in two minutes; see $data/server.log"; }
        sleep 0.05
    done
    local now
    now=$(date +%s.%N)
    disown
    awk -v p="$pid" -v port="$port" -v d="$data" -v a="$format_began" -v l="$launched" -v n="$now" \
        'BEGIN { printf "pid=%d kafka=127.0.0.1:%d took=%.2f format=%.2f data=%s\n", p, port, n - l, l - a, d }'
}

# ApiVersions v0 with correlation id 7; an answer of any length that repeats the 7 is enough.
answers() {
    local reply
    exec 9<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf '\0\0\0\012\0\022\0\0\0\0\0\07\377\377' >&9
    reply=$(timeout 2 dd bs=1 count=8 <&9 2>/dev/null | od -An -tx1 | tr -d ' \n' || true)
    exec 9>&-
    [ "${reply:8:8}" = 00000007 ]
} 2>/dev/null

halt() {
    local signal=$1 data=$2 pid
    [ -f "$data/pid" ] || kafka_fail "no pid file in $data"
    pid=$(cat "$data/pid")
    kill "-$signal" "$pid" 2>/dev/null || { rm -f "$data/pid"; return 0; }
    local tries=0
    while kill -0 "$pid" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 600 ] || { kill -KILL "$pid"; break; }
        sleep 0.1
    done
    rm -f "$data/pid"
}

case ${1:-} in
    fetch) kafka_fetch; echo "$kafka_dir" ;;
    start) shift; start "$@" ;;
    run) shift; run "$@" ;;
    stop) halt TERM "${2:?usage: kafka.sh stop DIR}" ;;
    kill) halt KILL "${2:?usage: kafka.sh kill DIR}" ;;
    *) sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
