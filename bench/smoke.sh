#!/usr/bin/env bash
# Flumen against Apache Kafka in one session, in under five minutes; see README.md beside this file.
# Arguments go to `flumen-bench smoke`. SMOKE_OUT names the file for the raw figures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}
exec "$target/release/flumen-bench" smoke --flumen "${FLUMEN_BIN:-$target/release/flumen}" --bench-dir bench \
    --out "${SMOKE_OUT:-bench/results/smoke.json}" --export "$@"
