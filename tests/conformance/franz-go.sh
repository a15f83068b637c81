#!/usr/bin/env bash
# franz-go's own integration and unit tests (pkg/kgo) against a broker.
#   franz-go.sh settings                      the broker settings that the suite wants, one a line
#   franz-go.sh fetch                         sources and test binary, into .cache/conformance
#   franz-go.sh run HOST:PORT OUT.tsv [NAME]  runs all tests, or those that NAME (a Go pattern) matches
# FRANZ_GO_SKIP is a Go pattern of tests to leave out: those of what the broker does not serve wait for minutes.
set -euo pipefail
. "$(dirname "$0")/env.sh"
version=v1.22.2
source=$cache_dir/franz-go-$version

fetch() {
    need go
    if [ ! -d "$source" ]; then
        local scratch module
        scratch=$(mktemp -d)
        (cd "$scratch" && go mod init fetch >/dev/null 2>&1 && go mod download "github.com/twmb/franz-go@$version")
        module=$(go env GOMODCACHE)/github.com/twmb/franz-go@$version
        rm -rf "$source.part" "$scratch"
        cp -r "$module" "$source.part" && chmod -R u+w "$source.part" && mv "$source.part" "$source"
    fi
    [ -x "$source/kgo.test" ] || (cd "$source/pkg/kgo" && go test -c -o "$source/kgo.test" .)
}

run() {
    local address=$1 out=$2 pattern=${3:-.}
    fetch
    cd "$source/pkg/kgo"
    local skip=()
    [ -z "${FRANZ_GO_SKIP:-}" ] || skip=(-test.skip "$FRANZ_GO_SKIP")
    # A failed test shows in the list; the exit status of the run says nothing more.
    KGO_SEEDS=$address KGO_TEST_RF=1 KGO_TEST_RECORDS=${KGO_TEST_RECORDS:-10000} KGO_LOG_LEVEL=${KGO_LOG_LEVEL:-none} \
        go tool test2json -t "$source/kgo.test" -test.v=test2json -test.count=1 -test.timeout=1200s \
        -test.run "$pattern" ${skip[@]+"${skip[@]}"} >"$out.json" 2>"$out.log" || true
    python3 "$conformance_dir/results.py" go <"$out.json" >"$out"
}

case ${1:-} in
    settings) echo group.initial.rebalance.delay.ms=0 ;;
    fetch) fetch ;;
    run) shift; run "$@" ;;
    *) sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
