# For newcomers: `make setup`, `make demo` and `make test`; the last two set up the environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint docs results clean

setup: $(READY)

# Repeated when its sources change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "vidgen needs Python 3.10 or newer; choose one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Creating the environment in $(VENV) (about a minute; torch is the largest part) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: setup
	@$(BIN)/python -m vidgen.demo --output-dir runs/demo

# Two test files in parallel, each on one core, the longest ones first (tests/conftest.py).
test: setup lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Code, spelling, and idioms that readers stumble over.
lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/python tests/check_style.py

# The table of all config keys, from their declarations.
docs: setup
	@$(BIN)/python -m vidgen.training.config_table > docs/config.md

# Pages and plots of docs/results, from its JSON records.
results: setup
	@$(BIN)/python -m benchmarks.results

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
