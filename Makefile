# Every target sets itself up: Python >= 3.10 and a package index are enough.
#   make PYTHON=python3.12 demo     another interpreter
#   make VENV=/tmp/agglo demo       another folder for the environment

PYTHON ?= python3
VENV   ?= .venv

# One stamp per set of dependencies; all depend on pyproject.toml, so a second run starts at once.
QUICKSTART := $(VENV)/.quickstart-stamp
DEV        := $(VENV)/.dev-stamp
FIFTYONE   := $(VENV)/.fiftyone-stamp

AGGLO := $(VENV)/bin/python -m agglo

comma := ,

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo check test test-fiftyone fast fast-unit fast-rest lint bench docs setup clean

# The markers say why a test is slow; pyproject.toml describes them.
SLOW := training or evals or weights or libraries or processes

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(QUICKSTART)  ## distil a student from real teachers on this machine and write a report (about 7 minutes)
	@if [ -f runs/quickstart/recipe.yaml ] && [ ! -d runs/quickstart/model ]; then \
	  echo "agglo: resuming the unfinished run in runs/quickstart/"; \
	  $(AGGLO) train runs/quickstart/recipe.yaml --out runs/quickstart --resume; \
	else \
	  if [ -e runs/quickstart ]; then \
	    old=runs/quickstart-$$(date +%Y%m%d-%H%M%S); mv runs/quickstart $$old; echo "agglo: the earlier run is now $$old/"; \
	  fi; \
	  echo "agglo: distilling a student into runs/quickstart/"; \
	  $(AGGLO) train quickstart; \
	fi
	@echo "agglo: open runs/quickstart/report.html in a browser; 'source $(VENV)/bin/activate' gives you the agglo command"

check: $(DEV)  ## lint, types and the fast tests, side by side: run it before each commit (about 2 minutes)
	@$(MAKE) --no-print-directory -j2 fast-unit lint fast-rest

test: $(DEV)  ## run all tests but those of the FiftyOne integration
	@$(VENV)/bin/python -m pytest -q --ignore=tests/fiftyone

test-fiftyone: $(FIFTYONE)  ## run the tests of the FiftyOne integration: database, App in Chromium, notebook
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q tests/fiftyone

fast: fast-unit fast-rest  ## run the tests that are not marked as slow

# Two parts, so that both cores work: `check` runs the second one beside the type checker.
fast-unit: $(DEV)
	@$(VENV)/bin/python -m pytest -q -m "not ($(SLOW))" tests/unit
fast-rest: $(DEV)
	@$(VENV)/bin/python -m pytest -q -m "not ($(SLOW))" --ignore=tests/unit --ignore=tests/fiftyone

lint: $(DEV)  ## check style, layers and types
	@echo "== ruff check";   $(VENV)/bin/ruff check .
	@echo "== ruff format";  $(VENV)/bin/ruff format --check .
	@echo "== import-linter"; $(VENV)/bin/lint-imports
	@echo "== pyright";      $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(DEV)  ## measure the figures in the README (see benchmarks/README.md)
	@$(VENV)/bin/python benchmarks/run.py

docs:  ## list the pages of the documentation
	@echo "docs/all-of-agglo.md   the whole library on one page"
	@echo "docs/method.md         paper, file, equation"
	@echo "docs/log.md            experiments with numbers, the failed ones included"

setup: $(DEV)  ## install the development environment

clean:  ## remove the environment and caches; runs/ is kept
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment --------------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "agglo: '$(PYTHON)' not found. Install Python 3.10 or newer, or choose one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "agglo: needs Python 3.10 or newer, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "agglo: creating an environment in $(VENV)/"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
	  echo "agglo: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

define install
	@echo "agglo: installing agglo[$(1)] into $(VENV)/ (PyTorch is large: a few minutes, once)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable ".[$(1)]" || { \
	  echo "agglo: installation failed, see the lines above. Run the same command again to resume." >&2; exit 1; }
endef

# The development environment includes quickstart, so it serves the demo too.
$(QUICKSTART): pyproject.toml | $(VENV)/bin/python
	$(call install,quickstart)
	@touch $@

$(DEV): pyproject.toml | $(VENV)/bin/python
	$(call install,quickstart$(comma)dev)
	@touch $(QUICKSTART) $@

# FiftyOne shares the environment of the other tests: of their packages it lowers python-dateutil alone, to 2.9.
$(FIFTYONE): pyproject.toml | $(DEV)
	$(call install,quickstart$(comma)dev$(comma)test-fiftyone)
	@touch $(QUICKSTART) $(DEV) $@
