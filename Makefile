PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: install demo test check bench quality clean

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

demo: install
	$(BIN)/sapo demo

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

# CPU time and peak memory against the published way, against trl, and with each part switched off; about an hour.
bench: install
	export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000; \
	$(BIN)/python benchmarks/step.py self-play; \
	$(BIN)/python benchmarks/step.py self-play --jitter 96 --variants "published way" ours; \
	$(BIN)/python benchmarks/step.py self-play --size 32k --batch 4 --variants "published way" ours; \
	$(BIN)/python benchmarks/step.py paired --batch 4 --steps 2; \
	$(BIN)/python benchmarks/step.py lora --steps 2; \
	$(BIN)/python benchmarks/generation.py; \
	$(BIN)/python benchmarks/bookkeeping.py

# Methods times seeds on the built-in tasks (docs/comparisons.md); about half an hour of CPU, resumable.
quality: install
	export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000; \
	$(BIN)/python benchmarks/quality/study.py toy --minutes 60

clean:
	rm -rf $(VENV) build dist src/*.egg-info
