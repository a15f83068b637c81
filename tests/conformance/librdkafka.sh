#!/usr/bin/env bash
# librdkafka's own test suite (the C sources that crate rdkafka-sys carries) against a broker.
#   librdkafka.sh settings                        the broker settings that the suite wants, one a line
#   librdkafka.sh fetch                           sources and build, into .cache/conformance
#   librdkafka.sh run HOST:PORT OUT.tsv [NUMBER[:SUBTEST]]...   one process each; all of the mode without a number
# LIBRDKAFKA_MODE: default, idempotent (every producer is), consumer (KIP-848 groups) or noautocreate (a broker with
# auto-creation off).
set -euo pipefail
. "$(dirname "$0")/env.sh"
version=4.10.0+2.12.1
source=$cache_dir/librdkafka-$version
mode=${LIBRDKAFKA_MODE:-default}
# Tests that do only a part in the suite's quick mode.
whole=" 0030 0045 0077 0081 0082 0098 "

fetch() {
    if [ ! -x "$source/tests/test-runner" ]; then
        need gcc g++ make
        need_files zlib.h=zlib1g-dev openssl/ssl.h=libssl-dev curl/curl.h=libcurl4-openssl-dev zstd.h=libzstd-dev \
            rapidjson/rapidjson.h=rapidjson-dev
        crate rdkafka-sys "$version" "$cache_dir/rdkafka-sys-$version"
        rm -rf "$source.part"
        cp -r "$cache_dir/rdkafka-sys-$version/librdkafka" "$source.part"
        # One broker cannot hold three replicas.
        sed -i -E 's/(create_topic_wait_exists\([^;]*), 3, 5000\)/\1, 1, 5000)/; s/(create_topic\([^;]*, 1), 3\)/\1, 1)/' \
            "$source.part/tests"/{0098-consumer-txn.cpp,0103-transactions.c,0107-topic_recreate.c,0111-delay_create_topics.cpp}
        # Output beside the sources must not be named configure.*: mklove takes such a file for a module.
        (cd "$source.part" && ./configure --disable-gssapi && make -j2 libs && make -j2 -C tests build) \
            >"$cache_dir/librdkafka-build.log" 2>&1 || suite_fail "the build failed; see $cache_dir/librdkafka-build.log"
        rm -rf "$source"
        mv "$source.part" "$source"
    fi
    # The suite calls Kafka's own tools by these names.
    local bin=$cache_dir/kafka-tools/bin
    [ -x "$bin/kafka-configs.sh" ] && return 0
    mkdir -p "$bin"
    tool() {
        printf '#!/usr/bin/env bash\nexec bash %q %s "$@"\n' "$repository/bench/kafka-tool.sh" "$2" >"$bin/$1"
        chmod +x "$bin/$1"
    }
    tool kafka-topics.sh org.apache.kafka.tools.TopicCommand
    tool kafka-acls.sh org.apache.kafka.tools.AclCommand
    tool kafka-configs.sh kafka.admin.ConfigCommand
}

# A number per test, and one of its subtests alone where the list names some: 0081 ends at the first of its subtests that
# fails. It also changes a setting of the whole broker, so it comes last.
numbers() {
    local list=$conformance_dir/librdkafka.kafka.tsv all
    [ "$mode" = default ] || list=$conformance_dir/librdkafka.$mode.kafka.tsv
    all=$(cut -f1 "$list" | sed -E 's,^([0-9]+)[^/]*(/(.*))?$,\1:\3,; s/:$//' | sort -u)
    grep -v '^0081' <<<"$all" || true
    grep '^0081:' <<<"$all" || true
    grep -x 0081 <<<"$all" || true
}

# A process of its own per number: one that hangs or crashes takes no other test along.
one() {
    local number=${1%%:*} subtest=""
    [[ "$1" != *:* ]] || subtest=${1#*:}
    shift
    # The shell's own note of a crash goes where the output goes.
    { TESTS=$number SUBTESTS=$subtest timeout -k 5 "${LIBRDKAFKA_TEST_SECONDS:-400}" ./test-runner "${flags[@]}" "$@" \
        >"$out.one"; } 2>>"$out.one" || true
    { echo "##### $number $subtest $*"; cat "$out.one"; } >>"$out.log"
    python3 "$conformance_dir/results.py" librdkafka "$number" "$subtest" <"$out.one" >"$out.one.tsv"
}

run() {
    local address=$1 out
    out=$(realpath -m "$2")
    shift 2
    fetch
    cd "$source/tests"
    local flags=(-p1 -E -L -V 4.0.0)
    case $mode in
        default) ;;
        idempotent) flags+=(-P) ;;
        consumer) export TEST_CONSUMER_GROUP_PROTOCOL=consumer ;;
        noautocreate) flags+=(-s noautocreate) ;;
        *) suite_fail "unknown LIBRDKAFKA_MODE $mode" ;;
    esac
    local conf=$out.conf
    printf 'bootstrap.servers=%s\ntest.timeout.multiplier=%s\n' "$address" "${LIBRDKAFKA_TIMEOUT_MULTIPLIER:-2}" >"$conf"
    export LD_LIBRARY_PATH=../src:../src-cpp RDKAFKA_TEST_CONF=$conf BROKERS=$address KAFKA_PATH=$cache_dir/kafka-tools
    : >"$out"
    : >"$out.log"
    local number quick tests
    tests=("$@")
    [ ${#tests[@]} -gt 0 ] || mapfile -t tests < <(numbers)
    for number in "${tests[@]}"; do
        quick=(-Q)
        [[ "$whole" != *" ${number%%:*} "* ]] || quick=()
        one "$number" ${quick[@]+"${quick[@]}"}
        # Quick mode leaves whole tests out and calls them passed: no time was spent. Mocks need none of a broker's.
        if [ ${#quick[@]} -gt 0 ] && grep -v _mock "$out.one.tsv" | grep -q "$(printf '\tpass\t0\.0$')"; then
            one "$number"
        fi
        tee -a "$out" <"$out.one.tsv"
    done
    rm -f "$out.one" "$out.one.tsv"
}

case ${1:-} in
    settings)
        printf '%s\n' num.partitions=4 broker.rack=RACK1 group.initial.rebalance.delay.ms=0
        # ACL tests assume a broker that lets everyone in until somebody sets some.
        [ "${2:-}" != kafka ] || printf '%s\n' allow.everyone.if.no.acl.found=true \
            authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
        if [ "$mode" = noautocreate ]; then echo auto.create.topics.enable=false; else echo auto.create.topics.enable=true; fi
        ;;
    fetch) fetch ;;
    run) shift; run "$@" ;;
    *) sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
