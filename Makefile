# make train   sets everything up, trains the embedded policy on the embedded task, shows the result
# make test    sets everything up for tests, then lint, types and all tests
# make lint    lint and types only
# make clean   removes the environment and the caches; runs/ stays
#
# Needs Python >= 3.11 and make. Everything is installed into .venv, again only when setup.py changes.
#   make train WORKDIR=runs/mine ARGS="--config.train.steps=200 --config.rollout.width=32"
#   make test ARGS="tests/learn -m 'not slow'" JOBS=4
#   make train PYTHON=python3.12

PYTHON ?= python3
CONFIG ?= configs/tiny.py
WORKDIR ?= runs/tiny
ARGS ?=
# Processes that tests run in; 0 is this one alone. Each compiles by itself and needs its memory.
JOBS ?= 0

VENV := .venv
PIP := $(VENV)/bin/python -m pip --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help train test lint clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

train: $(VENV)/installed
	$(VENV)/bin/python -m treepo_jax.main --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find treepo_jax configs experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched only when its step has succeeded, so that an interrupted step runs again.
$(VENV)/created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) was not found. treepo_jax needs Python 3.11 or newer: install it," \
	    "or name one with 'make PYTHON=/path/to/python3.12 ...'" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1). treepo_jax needs Python 3.11 or newer: name" \
	    "one with 'make PYTHON=/path/to/python3.12 ...'" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V 2>&1)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: setup.py $(VENV)/created
	@echo "Installing treepo_jax and what it needs into $(VENV) (1.3 GB, a minute or two)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/installed-test: setup.py $(VENV)/installed
	@echo "Installing what its tests need into $(VENV) (1.7 GB, a minute or two)"
	@$(PIP) install --editable '.[test]'
	@touch $@
