# `make` alone lists what there is. All of it works from a fresh clone on Debian 12.

SHELL := /bin/bash

# Debian's own, where there is one: its modules (python3-libnbd) fit only that.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
# The kernel that `make demo` boots, and those that the kernel tests run under.
KERNEL ?= 6.1
KERNELS ?= 6.1 6.12
# The one under which systemd is process 1.
SYSTEMD_KERNEL ?= 6.12

venv := .venv
python := $(venv)/bin/python
sources := nbdlink tests $(wildcard bench)
# pip shows a progress bar to a person, and nothing to a log.
pip_install = $(python) -m pip install --disable-pip-version-check $$(test -t 1 || echo --quiet)

.PHONY: help demo test unit lint kernel-test systemd-test deb deb-test bench \
    bench-quick bench-attach bench-roads bench-recovery clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## a file served and attached, in a throw-away virtual machine
	@vagrant/provision.sh demo
	@$(MAKE) --no-print-directory $(venv)/.for-demo
	@$(python) -m tests.vm.boot --kernel $(KERNEL) --timeout 900 -- tests/vm/demo.sh

# Without root what is missing stays missing, and the tests say what they skip; not so in CI.
test: ## everything: tests here and on two kernels, linters, types
	@vagrant/provision.sh test || { [ $$? -eq 3 ] && [ -z "$$CI" ]; }
	@$(MAKE) --no-print-directory $(venv)/.for-tests
	@$(python) -m tests.vm.suite --host $(KERNELS:%=--kernel %) --systemd $(SYSTEMD_KERNEL) \
	    $(SUITE_OPTIONS)

unit: $(venv)/.for-tests ## the tests that take no virtual machine
	@$(python) -m pytest -m "not kernel and not systemd"

lint: $(venv)/.for-tests ## linters and types only
	@$(python) -m pytest tests/test_lint.py

kernel-test: ## the kernel tests only, in a virtual machine per kernel
	@vagrant/provision.sh kernel
	@$(MAKE) --no-print-directory $(venv)/.for-tests
	@$(python) -m tests.vm.suite $(KERNELS:%=--kernel %) $(SUITE_OPTIONS)

systemd-test: ## rules, units, power-off, in virtual machines with systemd
	@vagrant/provision.sh kernel
	@$(MAKE) --no-print-directory $(venv)/.for-tests
	@$(python) -m tests.vm.suite --systemd $(SYSTEMD_KERNEL) $(SUITE_OPTIONS)

deb: ## a Debian package, in build/deb
	@vagrant/provision.sh deb
	@debian/build build/deb

deb-test: deb ## install, upgrade and purge that package in a Debian of its own
	@vagrant/provision.sh deb
	@debian/try build/deb

# BENCH_OPTIONS: see `python -m bench.server --help`.
bench: ## `nbdlink serve` beside other servers; takes half an hour
	@vagrant/provision.sh bench
	@$(MAKE) --no-print-directory $(venv)/.for-bench
	@$(python) -m bench.server --output docs/benchmarks $(BENCH_OPTIONS)

bench-quick: ## the same in four minutes, with less of it; into build/
	@vagrant/provision.sh bench
	@$(MAKE) --no-print-directory $(venv)/.for-bench
	@$(python) -m bench.server --quick --output build/bench/quick $(BENCH_OPTIONS)

# Installed as users install it: an editable install looks every module up in a slower way.
bench-attach: ## how long `nbdlink attach` takes, beside nbd-client
	@vagrant/provision.sh kernel
	@$(MAKE) --no-print-directory $(venv)/.for-demo
	@$(PYTHON) -m venv --clear build/bench-venv
	@build/bench-venv/bin/python -m pip install --quiet --disable-pip-version-check .
	@build/bench-venv/bin/python -m compileall -q build/bench-venv/lib
	@mkdir -p docs/benchmarks
	@$(python) -m tests.vm.boot --kernel $(KERNEL) --timeout 600 --rw docs/benchmarks -- \
	    build/bench-venv/bin/python bench/attach.py docs/benchmarks/attach.md

bench-roads: ## TLS in the kernel, beside the relay and nbd-client's proxy
	@vagrant/provision.sh kernel
	@$(MAKE) --no-print-directory $(venv)/.for-demo
	@mkdir -p docs/benchmarks
	@$(python) -m tests.vm.boot --kernel $(KERNEL) --timeout 900 --rw docs/benchmarks -- \
	    $(venv)/bin/python -m bench.roads docs/benchmarks/roads.md

# RECOVERY_OPTIONS: see bench/recovery.py.
bench-recovery: ## how soon a device answers when its server is back
	@vagrant/provision.sh kernel
	@$(MAKE) --no-print-directory $(venv)/.for-demo
	@$(python) -m compileall -q nbdlink bench
	@mkdir -p docs/benchmarks
	@$(python) -m tests.vm.boot --kernel $(KERNEL) --timeout 1800 --rw docs/benchmarks -- \
	    $(venv)/bin/python -m bench.recovery --output docs/benchmarks/recovery.md \
	    $(RECOVERY_OPTIONS)

clean: ## remove what was built; the cache with the kernels stays
	rm -rf $(venv) build dist *.egg-info .coverage* .hypothesis .import_linter_cache \
	    .mypy_cache .pytest_cache .ruff_cache
	find $(sources) -name __pycache__ -prune -exec rm -rf {} +

# The bytecode is made here, as Python in a virtual machine without KVM is ten times slower.
$(venv)/.for-demo: pyproject.toml | $(venv)/.made
	@echo "installing nbdlink into $(venv)"
	@$(pip_install) --editable .
	@$(python) -m compileall -q nbdlink
	@touch $@

$(venv)/.for-tests: pyproject.toml | $(venv)/.made
	@echo "installing nbdlink and what its tests take into $(venv)"
	@$(pip_install) --editable '.[dev]'
	@touch $@

$(venv)/.for-bench: pyproject.toml | $(venv)/.made
	@echo "installing nbdlink and what its benchmarks take into $(venv)"
	@$(pip_install) --editable '.[bench]'
	@$(python) -m compileall -q nbdlink
	@touch $@

$(venv)/.made:
	@echo "making $(venv)"
	@$(PYTHON) -m venv --clear $(venv)
	@touch $@
