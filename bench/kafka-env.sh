# Sourced by kafka.sh and kafka-tool.sh: where the jars are, and how they get there.

bench_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache_dir=${FLUMEN_CACHE:-$(dirname "$bench_dir")/.cache}
kafka_dir=${KAFKA_DIR:-$cache_dir/kafka}
java=${JAVA_HOME:+$JAVA_HOME/bin/}java

kafka_fail() { echo "$(basename "$0"): $*" >&2; exit 1; }

# Fetches once, under a lock, into a directory that appears whole or not at all.
kafka_fetch() {
    [ -f "$kafka_dir/complete" ] && return 0
    command -v "$java" >/dev/null || kafka_fail "no java found: install a Java 17 or later runtime"
    command -v mvn >/dev/null || kafka_fail "no mvn found: install Maven, or set KAFKA_DIR to a directory with libs/*.jar and a file named 'complete'"
    mkdir -p "$(dirname "$kafka_dir")"
    exec 8>"$kafka_dir.lock"
    flock 8
    if [ ! -f "$kafka_dir/complete" ]; then
        local part="$kafka_dir.part"
        rm -rf "$part" "$kafka_dir"
        mkdir -p "$part/libs"
        mvn -q -B -f "$bench_dir/kafka/pom.xml" dependency:copy-dependencies -DoutputDirectory="$part/libs" >&2 \
            || kafka_fail "Maven could not fetch Apache Kafka (output above)"
        : >"$part/complete"
        mv "$part" "$kafka_dir"
    fi
    exec 8>&-
}
