# Two commands matter: `make serve` and `make test`. Both set up everything they need, once.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-more-clients
# Without a GPU one exact version, so that pip need not look for a CUDA build; with one, the newest that is supported.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11$(comma)<2.14,torch==2.13.0)
comma := ,
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet
SOURCES := demo launcher proto router shard benchmarks docs integration-tests setup.py
ARGS ?=

.PHONY: help serve test test-slow test-clients check lint type unit bench bench-router bench-startup gpu-check docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serve ## set up and serve the demo model on port 3000 (ARGS="--port 8080 --model-id ...")
	@exec $(BIN)/text-generation-launcher $(ARGS)

test: $(VENV)/.dev lint type ## set up, lint, type-check and run every test with coverage
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -m "not slow and not gpu" $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/python .ci/coverage_gate.py

test-slow: $(VENV)/.dev ## the storms, soaks and repeated rounds
	$(BIN)/pytest -m slow $(ARGS)

test-clients: $(VENV)/.dev $(CLIENTS)/.done ## langchain-huggingface, litellm and guidellm against the server
	$(BIN)/pytest -m slow integration-tests/test_more_clients.py $(ARGS)

check: $(VENV)/.dev lint type unit ## what every commit must pass: format, lint, types, imports, unit tests

lint:
	@$(BIN)/ruff format --check --quiet $(SOURCES)
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/lint-imports --config pyproject.toml --verbose > .lint-imports.log 2>&1 || { cat .lint-imports.log; exit 1; }

type:
	@$(BIN)/mypy --no-error-summary launcher/tgi_launcher proto/tgi_proto router/tgi_router shard/tgi_shard demo/tgi_demo

unit:
	$(BIN)/pytest -m "not slow and not gpu" demo launcher proto router shard benchmarks $(ARGS)

bench: $(VENV)/.dev ## load the server on the demo model; JSON under benchmarks/results/
	$(BIN)/python -m benchmarks.bench $(ARGS)

bench-router: $(VENV)/.dev ## CPU time of the router per token, on a fake shard
	$(BIN)/python -m benchmarks.router_cost $(ARGS)

bench-startup: $(VENV)/.dev ## time from launch to the first 200 of /health, by phase
	$(BIN)/python -m benchmarks.startup $(ARGS)

docs: $(VENV)/.dev ## write the generated pages of docs/ from the code
	@$(BIN)/python docs/generate.py

# Runs where there is a GPU, with whatever Python has torch there; installs nothing.
gpu-check: ## the equivalences and kernels on a CUDA device
	PYTHONPATH=demo:launcher:proto:router:shard $(PYTHON) -m pytest -p no:cacheprovider shard/tests --device cuda $(ARGS)

clean: ## remove what was set up
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info

# Setting up. Both stamps depend on what decides the installed packages and the generated code.
$(VENV)/.serve: pyproject.toml setup.py proto/generate.proto proto/inference.proto
	@echo "Setting up in $(VENV), once; a few minutes"
	@echo "  1/3 a virtual environment"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  2/3 torch, the largest part"
	@$(PIP) "$(TORCH)"
	@echo "  3/3 the server and what it needs"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo "Setting up the development tools"
	@$(PIP) --editable ".[dev]"
	@touch $@

# Sees the server's packages after its own, so that no second torch is installed: guidellm requires one.
$(CLIENTS)/.done: integration-tests/more_clients.txt | $(VENV)/.dev
	@echo "Setting up more clients in $(CLIENTS) (once, about a minute)"
	@$(BIN)/python -m venv $(CLIENTS)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  "$$($(CLIENTS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/server.pth"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(CLIENTS)/bin/pip install --quiet --requirement $<
	@touch $@
