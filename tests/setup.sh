#!/usr/bin/env bash
# Installs the real clients and tools that the integration tests use. Repeatable; says what it does.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .cache

need_packages=()
command -v kcat >/dev/null 2>&1 || need_packages+=(kcat)
command -v openssl >/dev/null 2>&1 || need_packages+=(openssl)
[ -e /usr/include/zlib.h ] || need_packages+=(zlib1g-dev)
if [ ${#need_packages[@]} -gt 0 ]; then
  if command -v apt-get >/dev/null 2>&1; then
    echo "== installing ${need_packages[*]}"
    sudo=""; [ "$(id -u)" = 0 ] || sudo="sudo"
    $sudo apt-get update -qq && $sudo apt-get install -y -qq "${need_packages[@]}" >/dev/null
  else
    echo "missing: ${need_packages[*]} (no apt-get here: install them by hand)" >&2
    exit 1
  fi
fi

if [ ! -x .cache/venv/bin/python ] || ! .cache/venv/bin/python -c 'import kafka, confluent_kafka, clickhouse_connect, snappy, lz4, zstandard' 2>/dev/null; then
  echo "== python clients into .cache/venv"
  python3 -m venv .cache/venv
  .cache/venv/bin/pip install -q 'kafka-python>=2.2' confluent-kafka clickhouse-connect python-snappy lz4 zstandard
fi

if command -v java >/dev/null 2>&1 && command -v mvn >/dev/null 2>&1; then
  echo "== Apache Kafka's Java tools"
  bash bench/kafka.sh fetch
else
  echo "== no Java and Maven here: the Java tools' tests will be reported as not run"
fi
