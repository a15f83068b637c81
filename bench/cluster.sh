#!/usr/bin/env bash
# Three nodes against three of Apache Kafka; see README.md beside this file. Arguments go to `flumen-bench cluster`
# (--quick, --check, --seconds N). CLUSTER_OUT names the file for the raw figures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}
exec "$target/release/flumen-bench" cluster --flumen "${FLUMEN_BIN:-$target/release/flumen}" --bench-dir bench \
    --out "${CLUSTER_OUT:-bench/results/cluster.json}" "$@"
