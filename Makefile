# Drover. `make help` lists what can be made. On a bare machine `make demo` and `make test` do
# all the set-up first.
# Everything that a target writes is under build/ and .venv/; a second call is instant.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Most tests wait for most of their time; more than two on two cores make each other late.
TEST_PROCESSES ?= 2
QEMU   ?=
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
IMAGE  := deploy/lab/guest_image
VFIO   := deploy/lab/devices/vfio
LINUX  := deploy/lab/linux_guest
export PYTHON VENV

PYTEST := $(PY) -m pytest --durations=10

##@ Use
.PHONY: demo
demo: setup $(if $(filter 11%,$(QEMU)),qemu-11)  ## empty a host of real guests (QEMU=11.1: with that QEMU)
	@$(VENV)/bin/drover demo $(if $(QEMU),--qemu $(QEMU)) $(ARGS)

.PHONY: setup
setup: system venv guest vfio linux-guest  ## system packages, Python environment, guest images, what gives QEMU devices

.PHONY: qemu-11
qemu-11:  ## QEMU 11.1 in build/qemu-11.1, for devices inside the VMM (`drover up --qemu 11.1`)
	@deploy/qemu-11.sh

##@ Check
.PHONY: test
test: setup  ## all tests, two at a time (ARGS="-k late_ack" for some of them, TEST_PROCESSES=0 for one at a time)
	$(PYTEST) -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder tests $(ARGS)

.PHONY: test-fast
test-fast: venv  ## unit, property and contract tests that need no QEMU, ZooKeeper or cluster
	$(PYTEST) tests/unit tests/property tests/contract -m "not integration and not qemu and not zookeeper and not long" $(ARGS)

.PHONY: rules
rules: setup  ## the tests of each rule (R1-R31, H1-H16), and a table of them (docs/rules.md)
	$(PYTEST) tests -m rule $(ARGS)

.PHONY: oracle
oracle: setup qemu-11  ## 200 real migrations of QEMU 11.1 against our machine of its ACKs (DROVER_SEED=n repeats one)
	DROVER_LONG=1 $(PYTEST) tests/oracle $(ARGS)

.PHONY: matrix
matrix: setup  ## the kill matrix of guests with disks and of adopted ones: each part, at each step (about 25 minutes; table in build/matrix.json)
	DROVER_LONG=1 $(PYTEST) tests/integration/handover/test_matrix.py tests/integration/handover/test_adoption.py -s $(ARGS)

.PHONY: explore
explore: venv  ## the exploration of the hand-over with wider bounds (some minutes)
	DROVER_LONG=1 $(PYTEST) tests/exploration -s $(ARGS)

.PHONY: libvirt
libvirt: setup  ## every case of hosts that run their guests by libvirt (minutes; make test has the decisive ones)
	DROVER_LONG=1 $(PYTEST) tests/contract/test_engine_libvirt.py tests/integration/test_libvirt_cluster.py $(ARGS)

.PHONY: test-systemd
test-systemd: setup  ## the packages on three hosts with a real systemd each (root, minutes; table in build/test-systemd.json)
	DROVER_LONG=1 $(PYTEST) tests/systemd -s $(ARGS)

.PHONY: check
check: venv  ## style, types (of what changed; ALL=1: of every file), import rules, stubs: for each commit
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target check-types check-style check-imports check-protos
	@echo "check: all passed"

.PHONY: check-style check-types check-imports check-protos
check-types:
	@$(PY) scripts/check_types.py $(if $(ALL),--all)
check-style:
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check --quiet .
check-imports:
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(PY) -m pytest --quiet --no-header --noconftest -p no:cacheprovider tests/unit/test_import_rules.py
check-protos:
	scripts/protos.sh check
	scripts/protos.sh lint

.PHONY: bench-late-ack
bench-late-ack: setup qemu-11  ## what a late ACK costs, on real guests (about 5 minutes; ARGS="--scale 0.1" for a look)
	$(PY) -m tests.bench.late_ack $(ARGS)

.PHONY: bench-fleet
bench-fleet: setup  ## what a large fleet costs the control plane (about 20 minutes; ARGS="--only at_rest --scale 0.1")
	$(PY) -m tests.bench.fleet $(ARGS)

.PHONY: bench-guests
bench-guests: setup  ## what moving real guests costs (about 40 minutes; ARGS="--only floor --scale 0.1")
	$(PY) -m tests.bench.guests $(ARGS)

.PHONY: soak
MINUTES ?= 20
soak: setup  ## a cluster at work, every part restarted in turn, and what grew (MINUTES=20, ARGS=--light without QEMU)
	$(PY) -m tests.bench.soak --minutes $(MINUTES) $(ARGS)

##@ Install
.PHONY: deb
deb: venv  ## a Debian package for hosts, API and coordinators, in build/packages (ARGS="--version 0.1.0-2")
	@$(PY) -m deploy.packages.deb $(ARGS)

.PHONY: wheel
wheel: venv  ## a wheel for clients of the API, in build/packages
	@$(PY) -m deploy.packages.deb --wheel $(ARGS)

##@ Develop
.PHONY: format
format: venv  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix --quiet .
	$(VENV)/bin/ruff format --quiet .

.PHONY: protos
protos: venv  ## generate the stubs beside the .proto files
	scripts/protos.sh generate

.PHONY: docs
docs: venv  ## write the tables of docs/configuration.md from the code
	$(PY) -m scripts.config_page

.PHONY: lock
lock: venv  ## resolve requirements.lock anew from pyproject.toml (ARGS="--upgrade" for newer versions)
	$(VENV)/bin/uv pip compile pyproject.toml --group dev --universal --generate-hashes --no-emit-index-url \
	    --custom-compile-command "make lock" --quiet -o requirements.lock $(ARGS)

.PHONY: clean
clean:  ## remove build/, .venv/ and every cache
	rm -rf build dist $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find orchestrator agents deploy protos tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help:  ## this list
	@awk 'BEGIN { FS = ":.*##" } /^##@/ { printf "\n%s\n", substr($$0, 5) } /^[a-z0-9-]+:.*##/ { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- set-up -----------------------------------------------------------------------------------------------------------

.PHONY: system
system:
	@deploy/install-system.sh

.PHONY: venv
venv: $(READY)

# pip checks every file against the hashes in requirements.lock; the project itself is installed in place, without them.
# A virtual environment that was left half made has no pip yet and is made again over itself.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: Drover needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1); name another with PYTHON=..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { deploy/install-system.sh --only python && $(PYTHON) -m venv $(VENV); }
	@echo "make: installing the Python environment into $(VENV) (about a minute the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-input --no-deps --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: guest
guest: build/guest.elf

build/guest.elf: $(wildcard $(IMAGE)/*)
	@mkdir -p $(@D)
	$(IMAGE)/build.sh $@

.PHONY: vfio
vfio: build/vfio-preload.so

# Where its kernel cannot be had (status 69) the script says so, and demo and tests do without that guest.
.PHONY: linux-guest
linux-guest:
	@$(LINUX)/build.sh build/linux || [ $$? -eq 69 ]

build/vfio-preload.so: $(VFIO)/preload.c $(VFIO)/build.sh
	$(VFIO)/build.sh $@
