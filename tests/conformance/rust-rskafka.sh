#!/usr/bin/env bash
# The integration tests of crate rskafka (a client of its own, with librdkafka and Java as partners) against a broker.
#   rust-rskafka.sh settings                        the broker settings that the suite wants, one a line
#   rust-rskafka.sh fetch                           sources and build, into .cache/conformance
#   rust-rskafka.sh run HOST:PORT OUT.tsv [NAME]    all tests, or those whose name contains NAME
# The Java partners need Java and Maven; without them their tests are left out.
set -euo pipefail
. "$(dirname "$0")/env.sh"
version=0.6.0
source=$cache_dir/rskafka-$version
export CARGO_TARGET_DIR=$cache_dir/target

fetch() {
    need cargo make gcc
    need_files zlib.h=zlib1g-dev
    if [ ! -d "$source" ]; then
        crate rskafka "$version" "$source"
        # It asks for one compiler by version; any of today will do. The locked rsasl does not build with compilers of today.
        (cd "$source" && rm -f rust-toolchain* && cargo update -q -p rsasl --precise 2.3.1) || suite_fail "cannot update rsasl"
    fi
    (cd "$source" && cargo test --quiet --no-run --features full --tests) >"$cache_dir/rskafka-build.log" 2>&1 \
        || suite_fail "the build failed; see $cache_dir/rskafka-build.log"
}

run() {
    local address=$1 out filter=${3:-} java=()
    out=$(realpath -m "$2")
    fetch
    cd "$source"
    if command -v java >/dev/null && command -v mvn >/dev/null; then java=(TEST_JAVA_INTEROPT=1); fi
    env TEST_INTEGRATION=1 TEST_BROKER_IMPL=kafka "KAFKA_CONNECT=$address" RUSTC_BOOTSTRAP=1 ${java[@]+"${java[@]}"} \
        cargo test --no-fail-fast --features full --test '*' -- -Zunstable-options --report-time --test-threads=2 $filter \
        >"$out.log" 2>&1 || true
    python3 "$conformance_dir/results.py" cargo <"$out.log" >"$out"
}

case ${1:-} in
    settings) printf '%s\n' auto.create.topics.enable=false group.initial.rebalance.delay.ms=0 ;;
    fetch) fetch ;;
    run) shift; run "$@" ;;
    *) sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
