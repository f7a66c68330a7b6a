# make demo   the whole loop on the example exports
# make test   every check and test
# make dev    the Dagster UI and daemon on http://localhost:3000
# `make help` lists the rest.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export VIRTUAL_ENV := $(CURDIR)/.venv

.DEFAULT_GOAL := help
.PHONY: help setup demo test drills check audit format dev h2o-gateway bench-load bench-dataset bench-tokens bench-evaluation bench-merge bench-memory bench-search bench-train bench-sensor clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.installed ## Make .venv with everything in it (2 to 4 minutes, once)

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, this is $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into .venv (once, 2 to 4 minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev]' >.venv/install.log 2>&1 || { tail -20 .venv/install.log; exit 1; }
	@$(BIN)/python -c 'import dagster, torch, trl, xllamacpp' && touch $@

demo: .venv/.installed ## Run the whole loop on examples/exports (data lands in ./data/demo)
	@$(BIN)/lora-assets demo

test: check ## All checks and all tests, three at a time, as many of them wait
	@$(BIN)/pytest -n 3 --dist loadfile

drills: .venv/.installed ## Break a cluster in every way, in the middle of a training (half an hour)
	@$(BIN)/pytest -m drill -s tests/kubernetes

check: .venv/.installed ## Lint, format, types, import contracts, definitions
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/dg check defs
	@$(BIN)/dg list defs >/dev/null
	@$(BIN)/dagster definitions validate -w workspace.yaml --log-level warning

audit: .venv/.installed ## Licences of what is installed, and its known vulnerabilities (needs the network)
	@$(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit==2.10.1 pip-licenses==5.5.5
	@.venv/audit/bin/pip-licenses --python=$(BIN)/python --order=license
	@.venv/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

format: .venv/.installed ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

h2o-gateway: .venv/.installed ## The REST API before an H2O LLM Studio, on localhost (docs/h2o.md)
	@$(BIN)/python -m h2o_gateway

dev: .venv/.installed ## The Dagster UI and daemon on localhost
	@$(BIN)/lora-assets dev

bench-load: .venv/.installed ## How long the code location takes to load
	@$(BIN)/python benchmarks/load/bench.py

bench-dataset: .venv/.installed ## Dataset preparation beside other tools, on synthetic exports
	@$(BIN)/python benchmarks/dataset/bench.py

bench-tokens: .venv/.installed ## Counting tokens beside `tokenizers`
	@$(BIN)/python benchmarks/dataset/tokens.py

bench-evaluation: .venv/.installed ## Evaluating base and adapter beside two runs of the trainer
	@$(BIN)/python benchmarks/evaluation/bench.py

bench-merge: .venv/.installed ## Merging beside peft, and beside a plain copy
	@$(BIN)/python benchmarks/merge/bench.py

bench-memory: .venv/.installed ## Estimated memory beside published measurements, line by line
	@$(BIN)/python -m benchmarks.memory.bench

bench-search: .venv/.installed ## Search strategies beside chance, on standard functions (--tiny: real trainings)
	@$(BIN)/python -m benchmarks.search.bench

bench-train: .venv/.installed ## Training beside a plain TRL script: overhead, layout, start-up
	@$(BIN)/python -W ignore -m benchmarks.training.bench

bench-sensor: .venv/.installed ## A tick of the arrival sensor on 100,000 exports, and the size of its cursor
	@$(BIN)/python benchmarks/sensor/bench.py

clean: ## Remove the virtual environment and caches; data stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
