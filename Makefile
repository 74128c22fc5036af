# What people type. `make help` lists it.
CARGO ?= cargo
export CARGO_TERM_PROGRESS_WHEN = never

help:
	@echo "make demo    build, make a Debian image, boot it with 2 vCPUs, show what it does"
	@echo "make test    format, lints, documentation, unit tests, bare programs, Debian end to end, KVM in a test host"
	@echo "make bench   guest benchmarks: native, posada, QEMU TCG, and KVM in a test host; writes bench/results.md"
	@echo "make soak    the long run of the differential instruction test (SECONDS=600)"
	@echo "make fuzz    fuzz kernel images, guest code, snapshots, vsock packets, agents and image stores (SECONDS=600, needs cargo-fuzz and a nightly toolchain)"
	@echo "make build   build target/release/posada"
	@echo "make bare    build the bare test programs into target/bare"
	@echo "make agent   build target/agent/posada-agent, which runs in any Linux guest"
	@echo "make image   make the Debian kernel, initramfs and disks that demo and tests boot"
	@echo "make lint, make unit, make e2e, make e2e-translate, make e2e-check, make nested    the parts of make test"
	@echo "make nested-all    every test on KVM, in a test host (20 minutes)"
	@echo "make heavy   hard work in Debian on the translator, not part of make test (20 minutes)"
	@echo "make fmt     format the Rust code"

build:
	$(CARGO) build --release -p posada

bare:
	@$(MAKE) --no-print-directory -s -C guest/bare

# Static, so that it needs nothing of the guest; in a folder of its own, as no other crate has these flags.
agent:
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release -p posada-agent --target x86_64-unknown-linux-gnu \
		--target-dir target/agent
	install -s -m 755 target/agent/x86_64-unknown-linux-gnu/release/posada-agent target/agent/posada-agent

fmt:
	$(CARGO) fmt --all

demo: build
	scripts/demo

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

unit:
	$(CARGO) test --workspace --exclude posada-tests

image:
	@scripts/image >/dev/null

# One VM at a time: a test's time limit must not depend on its neighbours.
END_TO_END = POSADA_BIN=$(CURDIR)/target/release/posada $(CARGO) test -p posada-tests
ONE_BY_ONE = -- --test-threads=1 --skip on_kvm

# What the interpreter may do otherwise than the translator; e2e-translate has the rest too.
e2e: build bare image
	POSADA_SOFTWARE_CPU=interpret $(END_TO_END) --test bare --test gdb --test debian $(ONE_BY_ONE) \
		--skip four_cpus_lose_no_wake_up --skip what_is_written_outlives --skip a_disk_that_is_read_only

e2e-translate: build bare agent image
	POSADA_SOFTWARE_CPU=translate $(END_TO_END) $(ONE_BY_ONE)

# Each block on both, where that goes quickly.
e2e-check: build bare
	POSADA_SOFTWARE_CPU=check $(END_TO_END) --test bare $(ONE_BY_ONE)

# The tests that need a real KVM have it in a test host; without QEMU they say that they are skipped. `nested` has those
# that a busy machine does not disturb.
ON_KVM = $(END_TO_END) -- --test-threads=1 --nocapture
nested: build bare image
	$(ON_KVM) on_kvm_auto on_kvm_guests_end

nested-all: build bare image
	$(ON_KVM) on_kvm

# Compilers, interpreters that compile, libraries' own tests, the kernel's probes, in Debian on the translator.
heavy: build
	@scripts/image vmlinuz initramfs.cpio heavy.raw >/dev/null
	POSADA_SOFTWARE_CPU=$(or $(POSADA_SOFTWARE_CPU),translate) $(END_TO_END) --test heavy -- --test-threads=1 --ignored

test: lint unit e2e e2e-translate e2e-check nested

bench: build
	bench/run
	bench/nested

SECONDS ?= 600
soak:
	POSADA_SOAK_SECONDS=$(SECONDS) $(CARGO) test --release -p posada-x86 -- --nocapture --include-ignored differential

fuzz:
	$(CARGO) +nightly fuzz run kernel -- -max_total_time=$(SECONDS) -max_len=65536
	$(CARGO) +nightly fuzz run code -- -max_total_time=$(SECONDS)
	$(CARGO) +nightly fuzz run translate -- -max_total_time=$(SECONDS)
	$(CARGO) +nightly fuzz run snapshot -- -max_total_time=$(SECONDS) -max_len=65536
	$(CARGO) +nightly fuzz run vsock -- -max_total_time=$(SECONDS)
	$(CARGO) +nightly fuzz run agent -- -max_total_time=$(SECONDS)
	$(CARGO) +nightly fuzz run store -- -max_total_time=$(SECONDS) -max_len=16384

.DEFAULT_GOAL := help
.PHONY: help build bare agent image fmt demo lint unit e2e e2e-translate e2e-check nested nested-all heavy test bench soak fuzz
