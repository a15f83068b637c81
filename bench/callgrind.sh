#!/usr/bin/env bash
# Instructions per operation of the hot paths, against bench/results/instructions.json; see README.md beside this file.
#   callgrind.sh            count and compare: exit 1 when an operation got dearer by more than 3 %
#   callgrind.sh --update   count and keep
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v valgrind >/dev/null || { echo "callgrind.sh: valgrind is not installed" >&2; exit 1; }
cargo build --release -q -p flumen-micro
exec "${CARGO_TARGET_DIR:-target}/release/flumen-micro" gate "$@"
