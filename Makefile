# Every target installs what it needs; progress goes to standard output.
SHELL := /bin/bash
DEMO_SECONDS ?= 60
KEEP ?=

.PHONY: build engine setup demo demo-cluster test test-full crash-test sim chaos lint conformance differential bench-smoke bench-log bench-cluster \
	bench-instructions clean

build:
	cargo build --release -p flumen-broker

# The ClickHouse engine (libchdb.so), unless an outside server is named.
engine:
	@if [ -n "$$CLICKHOUSE_URL" ]; then echo "using CLICKHOUSE_URL"; else bash sink/embedded/fetch-engine.sh; fi

demo: build engine
	cargo build --release -p flumen-tests --bin flumen-demo
	DEMO_SECONDS=$(DEMO_SECONDS) target/release/flumen-demo $(if $(KEEP),--keep,)

# Three brokers that are one cluster: the same stream, one node after another killed, then all at once.
demo-cluster: build engine
	cargo build --release -p flumen-tests --bin flumen-demo
	DEMO_SECONDS=$(DEMO_SECONDS) target/release/flumen-demo --nodes 3 $(if $(KEEP),--keep,)

# Real clients for the integration tests: Python and Java ones, kcat.
setup: engine
	bash tests/setup.sh

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D clippy::correctness -D clippy::suspicious

test: setup
	bash tests/run.sh

test-full: setup
	FLUMEN_TEST_FULL=1 bash tests/run.sh

# Lives of a data directory on a simulated disk: N seeds from SEED on (N=0: until it is interrupted). A failure says how to
# repeat it; LOG=1 prints the operations on the disk before it.
N ?= 5000
SEED ?= 0
LOG ?=
crash-test:
	cargo build --release -p flumen-crash-test
	target/release/flumen-crash-test --seeds $(N) --seed $(SEED) $(if $(LOG),--log,)

# Brokers in one thread, on a simulated network: first many raft groups with a small driver, then whole shards on simulated
# disks. SEEDS=from..to (not included). A failure says how to repeat it and keeps its history for flumen-check in KEEP.
SEEDS ?= 0..2000
sim:
	cargo build --release -p flumen-sim
	for world in "" --shards; do target/release/flumen-sim $$world $(firstword $(subst .., ,$(SEEDS))) \
		$$(( $(lastword $(subst .., ,$(SEEDS))) - $(firstword $(subst .., ,$(SEEDS))) )) $(if $(KEEP),--keep $(KEEP),) || exit 1; done

# Three to five real processes in network namespaces (root), with clients and an export, under CYCLES faults that SEED chooses;
# PAUSE_MS: for how long a node may stand still. A failure keeps its directory.
CYCLES ?= 100
PAUSE_MS ?= 60000
chaos: engine
	cargo build -p flumen-broker
	FLUMEN_BIN=$(CURDIR)/target/debug/flumen CYCLES=$(CYCLES) SEED=$(SEED) PAUSE_MS=$(PAUSE_MS) \
		cargo test -p flumen-tests --test cluster_chaos -- --nocapture

bench-smoke: engine
	cargo build --release -p flumen-broker -p flumen-bench
	bash bench/kafka.sh fetch
	bash bench/smoke.sh $(BENCH_ARGS)

# The log against Apache Kafka, about 40 minutes; BENCH_ARGS="--only 1,4,10", "--quick", "--list".
bench-log:
	cargo build --release -p flumen-broker -p flumen-bench
	bash bench/kafka.sh fetch
	bash bench/log.sh $(BENCH_ARGS)

# Three nodes against three of Apache Kafka, about ten minutes; BENCH_ARGS="--quick".
bench-cluster:
	cargo build --release -p flumen-broker -p flumen-bench
	bash bench/kafka.sh fetch
	bash bench/cluster.sh $(BENCH_ARGS)

# Instructions of the hot paths by valgrind, compared with bench/results/instructions.json.
bench-instructions:
	bash bench/callgrind.sh

# Other people's suites (franz-go, librdkafka, rdkafka, rskafka) against a flumen process; about an hour.
conformance: build
	bash tests/conformance/run.sh

# The same single questions to Flumen and to Apache Kafka 4.3.1 (Java and Maven), whole answers compared; some three minutes.
differential: build
	cargo build --release -p flumen-tests --bin flumen-probe
	bash tests/conformance/differential.sh

clean:
	cargo clean
	rm -rf .cache demo-data
