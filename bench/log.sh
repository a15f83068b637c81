#!/usr/bin/env bash
# The log against Apache Kafka, row by row; see README.md beside this file. Arguments go to `flumen-bench log`
# (--list, --only 1,4,10, --quick, --check). LOG_OUT names the file for the raw figures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}
exec "$target/release/flumen-bench" log --flumen "${FLUMEN_BIN:-$target/release/flumen}" --bench-dir bench \
    --out "${LOG_OUT:-bench/results/log.json}" "$@"
