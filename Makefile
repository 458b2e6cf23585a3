# Everything that a person does with a checkout. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup up check test test-unit test-integration test-browser test-helm fuzz chaos bench migrate lock docs docs-site

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make .venv with everything, pinned

$(VENV)/.installed: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("vdiff needs Python 3.11 or newer; try make setup PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

up: setup ## run everything here: PostgreSQL, Redis, a worker, the API, Flower (options in ARGS)
	@exec $(BIN)/vdiff up $(ARGS)

check: setup ## lint, types, imports, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit -n 2

test: check test-integration ## everything

test-unit: setup ## unit tests
	$(BIN)/pytest tests/unit -n 2 $(ARGS)

test-integration: setup ## tests against a real PostgreSQL, a real Redis and real processes
	$(BIN)/pytest tests/integration -n 2 --dist loadfile $(ARGS)

test-browser: setup ## the dashboard in a real Chromium (CHROMIUM, or one on PATH), accessibility included
	$(BIN)/pytest tests/browser $(ARGS)

test-helm: setup ## the chart rendered by Helm itself, which is installed as a library for it (244 MB)
	$(BIN)/python -m pip install --quiet helm-python-sdk==0.2.2
	$(BIN)/pytest tests/unit/test_helm.py $(ARGS)

fuzz: setup ## random requests against the engine for minutes (ARGS="--minutes 10 --seed 7")
	$(BIN)/python -m tests.unit.engine.fuzz $(ARGS)

chaos: setup ## 1,000 jobs under 30 faults, every promise checked (ARGS="--jobs 10000 --faults 100 --seed 7")
	$(BIN)/python -m tests.chaos $(ARGS)

bench: setup ## the benchmarks, minutes (one of them: ARGS="queue --repeats 3")
	$(BIN)/python benchmarks/run_benchmark.py $(or $(ARGS),all)

migrate: setup ## bring the database of VDIFF_DATABASE_URL up to date
	$(BIN)/vdiff migrate

docs: setup ## rewrite the reference pages that follow from the code
	$(BIN)/python scripts/make_docs.py

docs-site: setup ## the documentation as a site, in build/docs/site; fails on a link that leads nowhere
	$(BIN)/python scripts/docs_site.py

lock: setup ## pin all dependencies anew
	$(BIN)/pip-compile --quiet --no-header --no-annotate --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --extra api --extra worker --extra embedded --extra flower --extra otel --output-file requirements.txt pyproject.toml
	$(BIN)/pip-compile --quiet --no-header --no-annotate --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --allow-unsafe --extra api --extra worker --extra embedded --extra flower --extra otel --extra dev --constraint requirements.txt --output-file requirements-dev.txt pyproject.toml
	@echo "then: pip install uv && python scripts/lock_images.py, which writes the images' locks with hashes"
	sed -i 's/^torch==2.13.0.*/torch==2.13.0/; s/^--.*//' requirements.txt requirements-dev.txt
