# What people type. `make help` lists it.
CARGO ?= cargo
export CARGO_TERM_PROGRESS_WHEN = never

help:
	@echo "make demo    build, make a Debian image, boot it with 2 vCPUs, show what it does"
	@echo "make test    format, lints, documentation, unit tests, bare programs, Debian end to end"
	@echo "make bench   guest benchmarks: native, posada, QEMU TCG; writes bench/results.md"
	@echo "make soak    the long run of the differential instruction test (SECONDS=600)"
	@echo "make bare    build the bare test programs into target/bare"
	@echo "make fmt     format the Rust code"

build:
	$(CARGO) build --release -p posada

bare:
	@$(MAKE) --no-print-directory -s -C guest/bare

fmt:
	$(CARGO) fmt --all

demo: build
	scripts/demo

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

unit:
	$(CARGO) test --workspace

# One VM at a time: a test's time limit must not depend on its neighbours.
e2e: build bare
	$(CARGO) test -p posada-tests -- --test-threads=1

test: lint unit

bench: build
	bench/run

SECONDS ?= 600
soak:
	POSADA_SOAK_SECONDS=$(SECONDS) $(CARGO) test --release -p posada-x86 -- --nocapture --include-ignored differential

.DEFAULT_GOAL := help
.PHONY: help build bare fmt demo lint unit e2e test bench soak
