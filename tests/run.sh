#!/usr/bin/env bash
# The test run: the binary, then unit, property, golden and integration tests of every crate.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "== build"
cargo build -p flumen-broker -p flumen-embedded --examples --bins
export FLUMEN_BIN="$PWD/target/debug/flumen"
echo "== no unsafe code outside the two doors"
# Tests that count allocations share an allocator of their own.
if grep -rlE 'unsafe (\{|fn|impl)' --include='*.rs' --exclude=counting_allocator.rs protocol storage/src storage/tests \
  storage/crash-test broker sink/src bench tests; then
  echo "unsafe code in a file above" >&2
  exit 1
fi
echo "== tests"
cargo test --workspace --no-fail-fast -- --test-threads=2
echo "== mutants of the log, in a build of their own"
cargo test -p flumen-crash-test --features mutants --test mutants -- --nocapture
echo "== mutants of the raft boundary and its driver, in a build of their own"
cargo test -p flumen-sim --features mutants --test mutants -- --nocapture
if [ -n "${FLUMEN_TEST_FULL:-}" ]; then
  echo "== mutants of whole shards, in the same build"
  cargo test -p flumen-sim --features mutants --test shard_mutants -- --nocapture
fi
