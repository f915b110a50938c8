# make          shows what there is
# PYTHON=...    the interpreter the virtual environment is made with

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# `demo` and `bench` need the laboratory; `test` and `dev` are extras of pyproject.toml by these names.
extras = [$(if $(filter demo,$1),experiments,$1)]

.DEFAULT_GOAL := help
.PHONY: help all demo test check docs package faults bench clean
.SECONDARY:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo  ## install, then compare five arms on handwritten digits: minutes on a CPU
	$(BIN)/fish-tuning run configs/experiments/digits.yaml

test: $(VENV)/.stamp-test  ## install with the test tools and run every test; ARGS="-k name" picks some
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

check: $(VENV)/.stamp-dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

all: test check docs package  ## every check there is

docs: $(VENV)/.stamp-docs  ## build the site into docs/_build/html; every warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

package: $(BIN)/python  ## build wheel and sdist, install them into an empty environment and try them
	$(BIN)/python scripts/try_package.py

faults: $(VENV)/.stamp-test  ## kill runs, damage files, fill disks, and see what survives; ARGS="--kills 50"
	$(BIN)/python tests/helpers/faults.py $(ARGS)

bench: $(VENV)/.stamp-demo  ## speed and memory against plain training; prints tables; ARGS="--device cuda"
	@status=0; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS) || status=1; done; \
		exit $$status

clean:  ## remove the virtual environment, caches and builds; results stay
	rm -rf $(VENV) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".$(call extras,$*)"
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) is not here: set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fish-tuning needs Python 3.11 or newer, $(PYTHON) is older: set PYTHON" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
