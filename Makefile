# `make demo` and `make test` do all the set-up by themselves; `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-kubernetes test-kubernetes-jobs coverage check lint format docs lock hooks clean

BIN := .venv/bin

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: ## Install the locked dependencies and this package into .venv
	@scripts/setup.sh

demo: setup ## Evaluate two example submissions, end to end
	@$(BIN)/python -m orchestrator.cli demo

test: setup ## Run the tests, without the slow ones
	@$(BIN)/pytest -n 2 -m "not slow and not kubernetes"

test-slow: setup ## Run the slow tests only
	@$(BIN)/pytest -m "slow and not kubernetes"

test-kubernetes: setup ## Run on the cluster of KUBECONFIG what can be shown there: docs/testing.md; TESTS=... for some
	@$(BIN)/pytest -m kubernetes -v $(TESTS)

test-kubernetes-jobs: setup ## 200 jobs through the Kubernetes adapter, with faults injected; SEED=... repeats a run
	@$(BIN)/pytest -m slow -s tests/kubernetes/test_jobs.py

coverage: setup ## Branch coverage by the tests, Ray's processes included, in htmlcov/; TESTS=... for some
	@rm -rf .measured htmlcov
	@PYTHONPATH=$(CURDIR)/tests/measuring $(BIN)/pytest -m "not slow and not kubernetes" $(TESTS); status=$$?; \
	  $(BIN)/coverage combine --quiet .measured && $(BIN)/coverage html --quiet && $(BIN)/coverage report && exit $$status

check: lint test ## All that has to pass before a commit

lint: setup ## Linter, formatter, types and import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## Format, and repair what the linter can
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

docs: setup ## Write docs/settings.md anew from the settings' docstrings
	@$(BIN)/python -m orchestrator.cli settings --markdown > docs/settings.md.new
	@mv docs/settings.md.new docs/settings.md

lock: ## Write requirements.lock anew from pyproject.toml (needs uv); UPGRADE=1 raises the pins
	@uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --generate-hashes \
	  --no-header --quiet $(if $(UPGRADE),--upgrade) --output-file requirements.lock

hooks: setup ## Run the linters before every git commit
	@$(BIN)/pre-commit install

clean: ## Remove .venv and every cache
	@rm -rf .measured .coverage htmlcov .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
