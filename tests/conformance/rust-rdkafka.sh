#!/usr/bin/env bash
# The integration tests of crate rdkafka (librdkafka's Rust client) against a broker.
#   rust-rdkafka.sh settings                        the broker settings that the suite wants, one a line
#   rust-rdkafka.sh fetch                           sources and build, into .cache/conformance
#   rust-rdkafka.sh run HOST:PORT OUT.tsv [NAME]    all tests, or those whose name contains NAME
set -euo pipefail
. "$(dirname "$0")/env.sh"
version=0.39.0
source=$cache_dir/rdkafka-$version
export CARGO_TARGET_DIR=$cache_dir/target

fetch() {
    need cargo cmake make gcc
    need_files zlib.h=zlib1g-dev
    if [ ! -d "$source" ]; then
        crate rdkafka "$version" "$source"
        # Address and port are ours to choose.
        sed -i 's/"bootstrap.servers", "localhost"/"bootstrap.servers", get_bootstrap_server()/' "$source"/tests/*.rs
        sed -i 's/assert_eq!(broker_metadata\[0\].port(), 9092);/assert_eq!(broker_metadata[0].port().to_string(), get_bootstrap_server().rsplit_once(":").unwrap().1);/' \
            "$source/tests/test_metadata.rs"
    fi
    (cd "$source" && cargo test --quiet --no-run --tests) >"$cache_dir/rdkafka-build.log" 2>&1 \
        || suite_fail "the build failed; see $cache_dir/rdkafka-build.log"
}

run() {
    local address=$1 out filter=${3:-}
    out=$(realpath -m "$2")
    fetch
    cd "$source"
    # --report-time is libtest's only way to tell seconds, and still behind a flag.
    KAFKA_HOST=$address RUSTC_BOOTSTRAP=1 cargo test --no-fail-fast --test '*' -- -Zunstable-options --report-time \
        --test-threads=4 $filter >"$out.log" 2>&1 || true
    python3 "$conformance_dir/results.py" cargo <"$out.log" >"$out"
}

case ${1:-} in
    settings) printf '%s\n' node.id=0 num.partitions=3 auto.create.topics.enable=true group.initial.rebalance.delay.ms=0 ;;
    fetch) fetch ;;
    run) shift; run "$@" ;;
    *) sed -n '2,5p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
