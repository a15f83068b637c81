# What the scripts with Apache Kafka's own tools share; sourced with the bootstrap servers in $bootstrap. Some tools with
# subcommands want them in front of these, others behind: $servers_first says "yes" for the former.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tools=org.apache.kafka.tools
tool() { # class, arguments without the bootstrap servers; prints output and errors, and fails on a warning
  local class=$1 status=0
  shift
  local arguments=("$@" --bootstrap-server "$bootstrap")
  [ "$servers_first" = no ] || arguments=(--bootstrap-server "$bootstrap" "$@")
  bash "$here/bench/kafka-tool.sh" "$class" "${arguments[@]}" >"$scratch/out" 2>&1 || status=$?
  cat "$scratch/out"
  if [ "$status" != 0 ] || grep -qE 'WARN|ERROR|Exception' "$scratch/out"; then
    echo "$class $* ended with $status:" >&2
    cat "$scratch/out" >&2
    return 1
  fi
}
expect() { # text, pattern
  grep -qE -- "$2" <<<"$1" || { echo "expected /$2/ in:" >&2; echo "$1" >&2; exit 1; }
}
