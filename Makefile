# Everything runs in .venv, which the first target that needs it creates.
# `make help` lists the targets; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell sed -n 's/^torch==/&/p' constraints.txt)

PYTEST_ARGS ?=
BENCH       ?= $(sort $(wildcard benchmarks/[a-z]*.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format types doctest docs notebooks bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set-up -----------------------------------------------------------------------------
# A stamp is touched when its installation has succeeded. A later run installs again only if
# setup.cfg or constraints.txt has changed since.

CREATED := $(VENV)/.created
USE     := $(VENV)/.installed-use
DEV     := $(VENV)/.installed-dev
PEERS   := $(VENV)/.installed-benchmarks

install: $(USE) $(DEV)  ## create .venv with everything needed to use and to change the package
	@echo "Ready: $(VENV), $$($(BIN)/python --version), $(TORCH)"

$(CREATED):
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "No virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(USE): setup.cfg constraints.txt | $(CREATED)
	@echo "Installing PyTorch ($(TORCH)) into $(VENV) (a few minutes the first time)"
	@$(PIP) install --quiet --constraint constraints.txt $(TORCH)
	@echo "Installing pyro_ext and what its tutorials and tests need"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[test,tutorials]'
	@touch $@

$(DEV): $(USE)
	@echo "Installing the tools for development and documentation (first time only)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

$(PEERS): $(USE)
	@echo "Installing the peers that the benchmarks run beside us (first time only)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[benchmarks]'
	@touch $@

# --- use --------------------------------------------------------------------------------

demo: $(USE)  ## sample a stochastic simulator's parameters: leaves a picture and a table
	@echo "Running tutorials/lotka_volterra/demo.py (a few minutes)"
	@$(BIN)/python tutorials/lotka_volterra/demo.py

test: $(USE)  ## run the tests (PYTEST_ARGS="-m 'not slow'" for the quick ones)
	@echo "Running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

notebooks: $(USE)  ## run every tutorial notebook with small numbers, to see that it still works
	@echo "Running the notebooks with small numbers"
	@$(BIN)/python tutorials/run_notebooks.py

bench: $(PEERS)  ## run the benchmarks (BENCH=benchmarks/one.py for one of them)
	@for script in $(BENCH); do \
	    echo "Running $$script"; \
	    $(BIN)/python $$script || exit 1; \
	done

# --- change -----------------------------------------------------------------------------

lint: $(DEV)  ## check style, and that `make format` would change nothing
	@echo "Checking style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV)  ## put the code into the common format
	@echo "Formatting"
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(DEV)  ## check the types of the package
	@echo "Checking types"
	@$(BIN)/mypy

doctest: $(USE)  ## run the examples in the docstrings
	@echo "Running the examples in the docstrings"
	@$(BIN)/python -m pytest --doctest-modules pyro_ext

docs: $(DEV)  ## build the documentation; a warning is an error
	@echo "Building the documentation"
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean:  ## remove what the targets made, except .venv
	@echo "Removing build products and caches"
	@rm -rf build dist docs/_build docs/tutorials/notebooks tutorials/*/output benchmarks/output
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path './$(VENV)' -prune -o -name __pycache__ -type d -print | xargs rm -rf
