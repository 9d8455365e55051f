# `make demo` and `make test` need Python 3.10+ and nothing else: each sets up .venv first.
PYTHON ?= python3
PYTHON_OLD ?= $(PYTHON)
PYTHON_NEW ?= $(PYTHON)
TORCH  ?= 2.13.0
TRITON ?= 3.7.1
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-slow matrix docs coverage lint bench bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	printf 'torch==%s\ntriton==%s\n' $(TORCH) $(TRITON) > $(VENV)/torch.txt
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint $(VENV)/torch.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint $(VENV)/torch.txt --editable ".[dev]"
	touch $@

demo: setup            ## sample digits with every method; writes demo_output/report.html
	$(BIN)/python -m cachekit.demo

test: setup            ## every law, doctests included; the kernels first, on the CPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/test_kernels.py
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: setup       ## the same laws on more classes, compiled more often, and whole documents
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

matrix:                ## the fast tests at both ends of the range of torch, in the Pythons PYTHON_OLD and PYTHON_NEW
	$(MAKE) test VENV=.venv-2.11 PYTHON=$(PYTHON_OLD) TORCH=2.11.0 TRITON=3.6.0
	$(MAKE) test VENV=.venv-2.15 PYTHON=$(PYTHON_NEW) TORCH=2.15.0 TRITON=3.9.0

docs: setup            ## draw the pictures and build the documents into site/
	$(BIN)/python docs/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

coverage: setup        ## try every method on every class, compiled too, and every scheduler; writes docs/coverage.{json,md}, schedulers.md
	$(BIN)/python -m cachekit.coverage --jobs 2 --save docs/coverage.json --markdown docs/coverage.md
	$(BIN)/python -m cachekit.coverage.schedulers docs/schedulers.md

lint: setup            ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup           ## what it costs to begin, what a cached step costs, what plans give; writes bench/results/
	$(BIN)/python bench/start.py
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/planning.py

bench-gpu:             ## the same on a GPU, in the Python that is there: PYTHON=...; writes bench/results/
	PYTHONPATH=.:kernels $(PYTHON) bench/gpu.py all

clean:
	rm -rf $(VENV) .venv-2.11 .venv-2.15 demo_output site .pytest_cache .hypothesis
