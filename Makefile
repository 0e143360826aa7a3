# Everything runs in .venv, which `make install` sets up. Two commands matter to a user: make quickstart, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
export OMP_WAIT_POLICY = PASSIVE
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: help install docs results quickstart test pytest test-slow test-browser test-timing test-oldest lint types bench torture gpu certify downstream clean

help:
	@echo "make quickstart    install, then compare a rule of each plugin with floor and ceiling on digits (no download)"
	@echo "make test          install, then lint, types and tests (JOBS=2 processes)"
	@echo "make test-slow     the longer tests: worked example, wheel, long examinations, injected faults"
	@echo "make docs          the documentation as a site in build/site: API, rules with certificates, search, notebooks"
	@echo "make test-browser  reports, site and MLflow's pages in the system's Chromium, headless; skipped, visibly, where there is none"
	@echo "make test-timing   tests that wait for threads and processes, ten times beside eight busy processes"
	@echo "make test-oldest   the tests on the oldest supported versions of the dependencies"
	@echo "make certify       renew the registry's missing or stale certificates (ALL=1: all), its index and tables"
	@echo "make support       try each rule on each kind of network, input and target, and write the tables of docs/networks.md"
	@echo "make downstream    install each plugin against this core in a clean environment, and certify it there (PLUGINS=\"noprop hebbian\")"
	@echo "make results       the tables of docs/results.md, README.md and the tutorial, from benchmarks/results"
	@echo "make bench         speed and memory, as ratios (benchmarks/)"
	@echo "make torture       faults of machines, servers, disks and people, injected and counted (FAULTS=\"kill-run fuzz\", QUICK=1; hours)"
	@echo "make cheaters      rules that cheat, and honest ones, through the certificate's whole runs (a quarter of an hour)"
	@echo "make gpu           tests, benchmarks and studies on CUDA, in resumable parts (PART=tests|bench|studies|papers)"

$(VENV)/installed: pyproject.toml requirements-dev.txt $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

install: $(VENV)/installed

# What a target needs beside the tools of all is installed by it.
$(VENV)/installed-%: pyproject.toml | install
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

# Strictly: a warning is an error. Nothing is fetched while it is built, and nothing when it is read.
docs: $(VENV)/installed-docs
	PYTHONPATH=docs $(BIN)/python -m sitemaker

# The system's Chromium is driven; none is downloaded.
test-browser: $(VENV)/installed-browser $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser

results: install
	$(BIN)/python benchmarks/results_page.py

quickstart: install
	$(BIN)/bpfree study run quickstart

# Lint, types and tests side by side; if one fails, the others are told of all the same.
test: install
	$(MAKE) --no-print-directory --keep-going --jobs=3 lint types pytest

# One thread each: the tests' tensors are small, and threads that wait for each other on a busy machine cost more than they bring.
pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m slow

# What waits for other threads and processes passes ten times in a row, in four processes beside eight busy ones. Only files that have
# such tests are collected: ten times four collections of all would take longer than the tests.
test-timing: install
	OMP_NUM_THREADS=1 $(BIN)/python .ci/busy.py --processes 8 --times 10 $(BIN)/python -m pytest -q -n 4 --dist loadfile \
	  -m "time_dependent and not slow" $$(grep -rl --include='test_*.py' time_dependent tests plugins/*/tests)

test-oldest:
	$(MAKE) VENV=.venv-oldest PYTHON=$(PYTHON) install-oldest
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n $(JOBS) --dist loadfile

.PHONY: install-oldest
install-oldest:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PYTHON) benchmarks/oldest.py > $(VENV)/oldest.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/oldest.txt -r requirements-dev.txt

lint: install
	$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	$(BIN)/python .ci/new_plugins.py lint

types: install
	$(BIN)/mypy
	$(BIN)/mypy plugins/*/src
	$(BIN)/python .ci/new_plugins.py types

bench: install
	$(BIN)/python benchmarks/run_all.py

# Writes benchmarks/results/torture-cpu.json and the table of docs/reliability.md; with QUICK=1 it only reports.
torture: install
	$(BIN)/python benchmarks/torture.py $(if $(QUICK),--quick,--save) $(if $(FAULTS),--faults $(FAULTS))

certify: install
	$(BIN)/python .ci/certify.py $(if $(ALL),--all)

# Tries each rule on each kind of network, input and target, and writes the tables of docs/networks.md.
.PHONY: support
support: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/support_table.py

# Writes benchmarks/results/cheaters-cpu.json and the tables of docs/certificates.md.
.PHONY: cheaters
cheaters: install
	$(BIN)/python benchmarks/certify_adversaries.py --save

downstream: install
	$(BIN)/python .ci/downstream.py $(PLUGINS)

gpu:
	bash benchmarks/gpu.sh $(or $(PART),all)

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache build
