# make help tells what there is. Everything runs in .venv, made with python -m venv and pip alone.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup train test lint bench clean

NODE := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
LOCK := clusters/requirements-$(NODE).txt
VENV := .venv/.made-for-$(NODE)
READY := .venv/.ready-$(NODE)
# Two makes at once install once: the second waits, then finds the work done. (macOS has no flock.)
ONE_AT_A_TIME := $(shell command -v flock >/dev/null && echo flock Makefile)
CANDIDATES := $(PYTHON) python3 python3.12 python3.11 python3.13 python
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

setup: ## install everything into .venv (done by the other targets where missing)
	@$(ONE_AT_A_TIME) $(MAKE) --silent $(READY)

train: setup ## watch a 135M language model learn arithmetic; ARGS="trainer.steps=40 ..." overrides the job
	@.venv/bin/reasoner train jobs/quickstart.yaml --if-exists new $(ARGS)

test: setup ## run the tests; ARGS="-k packing" selects
	@.venv/bin/python -m pytest $(ARGS)

lint: setup ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: setup ## run one measurement: make bench NAME=packing; results in benchmarks/results
	@if [ ! -f "benchmarks/$(NAME).py" ]; then \
	    echo "make bench NAME=...; one of: $$(cd benchmarks && ls [a-z]*.py | sed 's/\.py$$//' | xargs)" >&2; exit 2; fi
	@.venv/bin/python -m benchmarks.$(NAME) $(ARGS)

clean: ## remove .venv and caches; runs stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find reasoner_ray tests -name __pycache__ -prune -exec rm -rf {} +

# A virtual environment of the other kind of node is replaced, not mixed.
$(VENV):
	@for python in $(CANDIDATES) none; do "$$python" -c '$(USABLE)' 2>/dev/null && break; done || true; \
	if [ "$$python" = none ]; then \
	    echo "setup: none of '$(strip $(CANDIDATES))' is a Python 3.11, 3.12 or 3.13 with the venv module. Install one" \
	        "(Debian, Ubuntu: apt install python3.12-venv), or name it: make setup PYTHON=/path/to/python" >&2; exit 1; fi; \
	"$$python" -m venv --clear .venv
	@touch $@

$(READY): $(VENV) $(LOCK) pyproject.toml clusters/install.sh clusters/check.sh
	@clusters/install.sh .venv/bin/python $(NODE)
	@.venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation -e .
	@clusters/check.sh .venv/bin/python
	@touch $@
	@echo "setup: ready ($(NODE) node); .venv/bin/reasoner doctor tells more"
