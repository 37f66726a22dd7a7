# make train   train a small GPT on real text, four processes in two partition groups
# make test    all tests but the slow ones, in two processes; WORKERS=0 for one
# make test-slow    the slow ones: what starts whole programs, clusters and larger models
# make lint    style and types
# make clean   remove the environment and caches; outputs/, with its checkpoints, stays

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2

export OMP_NUM_THREADS ?= 1

.PHONY: train test test-slow lint clean install

train: install
	$(BIN)/python recipes/train.py $(ARGS)

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
