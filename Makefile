# `make test` is what CI runs: it builds a virtual environment once, then checks and tests.
# With an environment of your own (a GPU machine, say), skip make: `pip install -e .[test]`, then `pytest`.

VENV ?= .venv
PYTHON ?= python3
# The triton named here is the one that this torch was released with. From PyPI, torch for Linux brings gigabytes of CUDA
# libraries along; a machine without a GPU can do without them: TORCH="<a CPU build of torch> triton==3.7.1".
TORCH ?= torch==2.13.0 triton==3.7.1
JOBS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: test demo bench check format clean

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

# Downloads a 135M model (93 MB) the first time and keeps it in ~/.cache/eagle_fast.
demo: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/eagle-fast demo

# On a machine with a GPU: every record in bench/results, and the README's tables. The pair is measured too where the demo
# has run before and prompt files are named: PROMPTS="a.jsonl b.jsonl". BENCH holds more options of bench/suite.py.
bench: $(INSTALLED)
	$(BIN)/python bench/suite.py --prompts $(PROMPTS) $(BENCH)

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Reinstalls when pyproject.toml changes, and not otherwise: the install is editable.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
