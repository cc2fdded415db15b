# make demo [RECORD=path]   findings of the shipped classifier, in the terminal and as a picture
# make test                 the whole test suite
# make lint, make format    what pre-commit checks; what ruff can mend
# make test-floor           the test suite on the lowest supported versions
# Each target first makes its own environment (about 2.5 GB on disk) unless it is up to date.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RECORD ?=
WORKERS ?= logical
TEST_ARGS ?=

BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
PYTEST := env HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST_FLAGS := -n $(WORKERS) --maxprocesses 4 --dist loadfile -rs

.PHONY: help venv demo test test-floor lint format clean
help:
	@sed -n '1,/^$$/s/^# //p' Makefile

venv: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(if $(RECORD),"$(RECORD)")

test: $(VENV)/.installed
	$(PYTEST) $(BIN)/python -m pytest $(PYTEST_FLAGS) $(TEST_ARGS)

test-floor: .venv-floor/.installed
	$(PYTEST) .venv-floor/bin/python -m pytest $(PYTEST_FLAGS) $(TEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-floor build *.egg-info .pytest_cache .ruff_cache .hypothesis

# torch is asked for first and alone, with the pip that comes with Python: then a CPU build offered beside the index is
# taken, and nothing later pulls in another build with gigabytes of CUDA libraries.
define install
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(@D) (once; a few minutes) ..."
	@$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -qq -c $(1) "$(TORCH)"
	$(@D)/bin/python -m pip install -qq -c $(1) -e ".[dev]"
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,constraints.txt)

.venv-floor/.installed: pyproject.toml constraints-floor.txt
	$(call install,constraints-floor.txt)
