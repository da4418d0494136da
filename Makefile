# Tandem. `make serve` and `make test` do all the set-up a fresh machine needs (.ci/setup: a .venv of its own, no system
# packages) and are quick once that is done. Flags go through ARGS:  make serve ARGS="--port 8123"
#
#   TORCH=torch==2.13.0   what to install (a CPU build where nvidia-smi finds no GPU)
#   TORCH_INDEX=URL       where to take it from, if your index has only the other build
#   PYTHON=python3.12     what to build .venv with

TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTHON ?=
ARGS ?=
export TORCH TORCH_INDEX PYTHON

BIN := .venv/bin
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help serve test demo setup lint types format test-more chaos soak bench clean clean-venv

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

serve: ## set up what is missing, then serve the bundled model (ARGS="MODEL --port 8123 ...")
	@.ci/setup serve && exec $(BIN)/tandem serve $(ARGS)

demo: ## three tenants, a flood, a killed worker, for three minutes (ARGS="--seconds 60 --port 8123"); ends by itself
	@.ci/setup serve && exec $(BIN)/python -m examples.demo $(ARGS)

test: ## set up what is missing, then run the tests (ARGS="tests/engine -k blocks")
	@.ci/setup test && exec $(BIN)/python -m pytest $(ARGS)

setup: ## everything a developer needs: tests, ruff, mypy, chart tools, commit hooks
	@.ci/setup dev
	@if [ -e .git ]; then $(BIN)/pre-commit install >/dev/null; fi

lint: ## ruff: rules and formatting
	@.ci/setup dev && $(BIN)/ruff check . && $(BIN)/ruff format --check .

format: ## ruff: mend what it can
	@.ci/setup dev && $(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: ## mypy, strict, on the pure folders
	@.ci/setup dev && $(BIN)/mypy

test-more: ## the longer tests (TANDEM_TRACES and TANDEM_CRDS name the data they read)
	@.ci/setup test && exec $(BIN)/python -m pytest -m more $(ARGS)

chaos: ## kill workers under load, compare every token, and count (TANDEM_CHAOS_SEED, TANDEM_CHAOS_KILLS)
	@.ci/setup test && exec $(BIN)/python -m pytest -m chaos -o faulthandler_timeout=0 $(ARGS)

soak: ## a hundred thousand hand-overs: blocks, memory, descriptors, threads as at the start (TANDEM_SOAK_REQUESTS)
	@.ci/setup test && exec $(BIN)/python -m pytest -m soak -s -o faulthandler_timeout=0 $(ARGS)

bench: ## measure (ARGS="..."; without any it lists what there is)
	@.ci/setup test && exec $(BIN)/python -m bench $(ARGS)

clean: ## remove build products and caches
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: clean ## also remove .venv
	@rm -rf .venv
