# make demo: set up, then the main job from synthetic photographs to a measured model.   make test: set up, then all tests.
# make test-faults: the long kill-and-resume matrix.
# make soak MINUTES=60: a run to which something happens every minute, beside one to which nothing does.
# make test-slurm: the scripts of launch/ on a SLURM of two virtual nodes; needs root, takes some minutes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FUNDUSFM := $(BIN)/fundusfm
# Two tests at a time, one thread each: most wait for processes of their own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
# Of make soak: how long it takes, and which events come when.
MINUTES ?= 60
SEED ?= 0
COHORT := shards/built/demo
RUN := runs/ret_clip_demo

.PHONY: setup check test test-faults soak test-slurm demo bench bench-learning format

setup: $(VENV)/.installed

# Runs again only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "fundusfm needs Python 3.10 to 3.13; name one: make setup PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pytest tests/house

test: setup
	$(PYTEST)

test-faults: setup
	$(PYTEST) -m faults

soak: setup
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --seed $(SEED)

test-slurm: setup
	$(BIN)/pytest tests/slurm --timeout=3600 -rs

demo: setup
	$(FUNDUSFM) shards synth --out $(COHORT) --patients 2500 --seed 0 --size 96
	$(FUNDUSFM) shards check $(COHORT)
	$(FUNDUSFM) tokens train --shards $(COHORT) --out $(COHORT).tokens.json --vocab-size 1000
	rm -rf $(RUN)
	$(FUNDUSFM) pretrain recipes/ret_clip_demo.yaml
	$(FUNDUSFM) evaluate $(RUN) --shards $(COHORT) --workers 0

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python tests/bench/data.py
	$(BIN)/python tests/bench/contrastive.py

# Every tiny recipe trained and measured: about half an hour on two cores.
bench-learning: setup
	$(BIN)/python tests/bench/learning.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
