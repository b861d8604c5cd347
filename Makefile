# Every target makes what it needs: a virtual environment in .venv (and .venv-vllm for the real engine), with plain
# `python3 -m venv` and pip. Nothing is installed outside this folder.
PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
THIRD_PARTY_VENV := .venv-third-party
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := conserve_sdk broker/conserve_broker integrations/conserve_langgraph integrations/conserve_openai_agents integrations/conserve_pydantic_ai integrations/conserve_vllm lab/conserve_lab

.DEFAULT_GOAL := help
.PHONY: help demo demo-vllm test test-third-party test-vllm vllm-versions check bench release-check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(STAMP)  ## broker + emulated fleet + real LangGraph agents, with a live view and a closing table (about a minute)
	$(BIN)/conserve demo

demo-vllm: $(STAMP) vllm-venv  ## the same agents on real vLLM on CPU: one prefiller, two decoders, a small local model
	$(BIN)/conserve demo --engine vllm --vllm-venv $(VLLM_VENV)

test: $(STAMP)  ## every test that needs no vLLM, with the coverage gate
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal -m "not vllm"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered --skip-empty --fail-under=90
	$(BIN)/coverage report --include='conserve_sdk/core/*' --skip-covered --fail-under=100

test-vllm: $(STAMP) vllm-venv  ## the suite on real vLLM on CPU
	CONSERVE_REQUIRE_VLLM=1 CONSERVE_VLLM_VENV=$(VLLM_VENV) $(BIN)/pytest -m vllm tests/vllm

VLLM_VERSIONS ?= 0.32.0 0.31.0 0.30.0 0.29.0
vllm-versions: $(STAMP)  ## the suite on other vLLM versions too (VLLM_VERSIONS="0.31.0"; 2.5 GB and a quarter of an hour each)
	$(BIN)/python -m conserve_lab.vllm.versions $(VLLM_VERSIONS)

test-third-party: $(STAMP)  ## the examples over LiteLLM and LlamaIndex, in a virtual environment of their own (578 MB)
	$(PYTHON) -m venv $(THIRD_PARTY_VENV)
	$(THIRD_PARTY_VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(THIRD_PARTY_VENV)/bin/python -m pip install --quiet --editable . --group third-party
	CONSERVE_REQUIRE_THIRD_PARTY=1 CONSERVE_THIRD_PARTY_PYTHON=$(THIRD_PARTY_VENV)/bin/python $(BIN)/pytest tests/clients/test_third_party.py

check: $(STAMP)  ## formatting, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(PACKAGES) tests/typing .ci/release_check.py .ci/contracts_picture.py
	$(BIN)/lint-imports

bench: $(STAMP)  ## presets beside each other on the emulated fleet; writes bench.json and bench.md
	$(BIN)/conserve bench

release-check:  ## build sdist and wheel, check their contents, and try the wheel in empty virtual environments, each extra alone
	$(PYTHON) .ci/release_check.py

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

clean:  ## remove the virtual environments and caches
	rm -rf $(VENV) $(VLLM_VENV) $(THIRD_PARTY_VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(STAMP): pyproject.toml
	@echo "==> making $(VENV) and installing ConServe with all extras (about a minute)"
	@$(PYTHON) -c 'import sys, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || \
		{ echo "ConServe needs Python 3.11 or newer with its venv module: apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	@touch $@

.PHONY: vllm-venv
vllm-venv: $(STAMP)
	$(BIN)/python -m conserve_lab.vllm $(VLLM_VENV)
