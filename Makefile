# Two commands for a newcomer: `make demo` and `make test`. Both make the environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint docs results clean

setup: $(READY)

# Made again when what it is made from changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "vidgen needs Python 3.10 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making the environment in $(VENV) (about a minute; torch is the largest part) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: setup
	@$(BIN)/python -m vidgen.demo.__main__ --output-dir runs/demo

# Two files of tests at a time, on a core each.
test: setup lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# The table of all keys, from the code.
docs: setup
	@$(BIN)/python -m vidgen.training.config_table > docs/config.md

# docs/results.md and its pictures, from the JSON files in docs/results.
results: setup
	@$(BIN)/python -m benchmarks.results

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
