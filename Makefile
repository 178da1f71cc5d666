# Each target sets up all it needs: `make demo` and `make test` work on a fresh checkout, also below a path with spaces.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-fast check bench detection fuzz guests handover mutants soak clean

demo: $(VENV)/.run
	$(BIN)/sterna demo

# In parallel, and by one more than there are processors: most tests wait a good deal for their virtual machines.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $$(( $$(nproc) + 1 )) --maxprocesses 4

# Two minutes on two processors, once kernels are compiled: what needs no root, no KVM, no QEMU and no patience.
test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest --fast -n $$(nproc) --maxprocesses 4

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python bench/stage2.py
	$(BIN)/python bench/codec.py
	$(BIN)/python bench/ratelimit.py
	$(BIN)/python bench/multifd_channels.py
	$(BIN)/sterna bench

# How surely each fault of a hypervisor is found; the table of ARCHITECTURE.md. Others should not use the machine meanwhile.
DETECTION ?= --runs 100 --full 10 --busy 10 --sound 500
detection: $(VENV)/.dev
	$(BIN)/python -m tests.detection $(DETECTION)

# Findings are left in fuzz-findings/; MINUTES are for all decoders together, and once more for the property tests.
MINUTES ?= 10
fuzz: $(VENV)/.dev
	nice -n 15 $(BIN)/python -m tests.fuzz --minutes $(MINUTES)
	nice -n 15 $(BIN)/python -m tests.fuzz.properties --minutes $(MINUTES)

# Kills and stops both ends, and cuts the connection, at placed bytes; the table says who ran the guest. Some five minutes.
handover: $(VENV)/.dev
	$(BIN)/python -m tests.handover

# How many of a sample of mutants each folder's own tests kill. A run that was stopped goes on where it was; hours for all of them.
MUTANTS ?= --sample 200
mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutants $(MUTANTS)

# Does a process of many migrations grow? Some fifteen minutes.
MIGRATIONS ?= 3000
soak: $(VENV)/.dev
	$(BIN)/python -m tests.endurance.soak --migrations $(MIGRATIONS)

guests: $(VENV)/.dev
	$(BIN)/python -m sterna.guests.build

# A virtual environment needs ensurepip, which Debian and Ubuntu package apart from Python.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sterna needs Python 3.11 or later; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: installing python3-venv"; if [ "$$(id -u)" = 0 ]; then apt-get install -y -q python3-venv; else sudo apt-get install -y -q python3-venv; fi; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build .mutants .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .versions
	find src tests bench -name __pycache__ -type d -exec rm -rf {} +
