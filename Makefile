# `make test` is what CI runs first: it builds a virtual environment once, checks and tests. `make help` lists the rest.
# With an environment of your own (a GPU machine, say), skip make: `pip install -e .[test]`, then `pytest`.

VENV ?= .venv
PYTHON ?= python3
# torch, each time with the triton that it was released with; all else is held by constraints/. From PyPI, torch brings
# gigabytes of CUDA libraries along; a machine without a GPU can do without them: TORCH="<a CPU build of torch>
# triton==3.7.1". A TORCH that is given holds for `make oldest` too.
OLDEST_TORCH := $(or $(TORCH),torch==2.9.1 triton==3.5.1)
TORCH ?= torch==2.13.0 triton==3.7.1
JOBS ?= 2

# What depends most on transformers' version, for `make oldest` and `make between`: these test_*.py, wherever in tests/.
VERSION_TESTS := lossless target loading generate api zoo fused checkpoint doctor pairs packaging

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# One thread each: the threads of several test processes would wait for each other.
run_tests = OMP_NUM_THREADS=1 $(1)/bin/pytest -n $(JOBS) --dist worksteal
names_of_dependencies := import importlib.metadata as m, re; \
    print(*{re.match("[A-Za-z0-9_-]+", each)[0] for each in m.requires("eagle-fast")})
version_tests = $(foreach name,$(VERSION_TESTS),$(shell find tests -name 'test_$(name).py'))

.PHONY: test check format demo docs bench oldest between newest lmeval help clean

test: check # ruff, mypy and all tests, with the newest transformers that is promised
	$(call run_tests,$(VENV))

check: $(INSTALLED) # ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) # what ruff can mend by itself
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

demo: $(INSTALLED) # one prompt in three ways; downloads a model once (98 MB, of which 517 MB are made in ~/.cache/eagle_fast)
	$(BIN)/eagle-fast demo

docs: $(VENV)/docs-installed # the site into build/site, strictly: a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/docs-installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints/held.txt --no-build-isolation --editable '.[test,plot,docs]'
	touch $@

# The pair is measured too where the demo has run before and prompt files are named: PROMPTS="a.jsonl b.jsonl". BENCH
# holds more options of bench/suite.py.
bench: $(INSTALLED) # on a machine with a GPU: every record in bench/results, and the README's tables
	$(BIN)/python bench/suite.py --prompts $(PROMPTS) $(BENCH)

oldest: .venv-oldest/installed # what depends on versions, with the oldest ones that are promised
	$(call run_tests,.venv-oldest) $(version_tests)

between: .venv-between/installed # the same with a transformers from the middle of the range
	$(call run_tests,.venv-between) $(version_tests)

newest: # all tests with the newest release of everything, promised or not
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	.venv-newest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	    $$(.venv-newest/bin/python -c '$(names_of_dependencies)')
	.venv-newest/bin/python -m pip freeze --exclude-editable
	$(call run_tests,.venv-newest)

# Not among the test extra: 40 packages, 540 MB, whose newest takes no huggingface_hub as old as `make oldest` holds.
lmeval: $(INSTALLED) # installs lm-eval into the environment of `make test`, and compares its figures with the target's
	$(BIN)/python -m pip install --quiet --constraint constraints/held.txt lm_eval==0.4.13
	$(call run_tests,$(VENV)) tests/api/test_lm_eval.py

# An environment is completed when pyproject.toml or a constraint changes, and not otherwise: the install is editable.
$(INSTALLED): HELD := constraints/held.txt
.venv-oldest/installed: HELD := constraints/oldest.txt
.venv-oldest/installed: TORCH := $(OLDEST_TORCH)
.venv-between/installed: HELD := constraints/between.txt
$(INSTALLED) .venv-oldest/installed .venv-between/installed: pyproject.toml $(wildcard constraints/*.txt)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $(HELD) pip setuptools wheel
	$(@D)/bin/python -m pip install --quiet --constraint $(HELD) $(TORCH)
	$(@D)/bin/python -m pip install --quiet --constraint $(HELD) --no-build-isolation --editable '.[test,plot]'
	touch $@

print-%: # a variable's value, for scripts
	@echo $($*)

help: # this list
	@sed -n 's/^\([a-z]*\):[^#]*# /\1\t/p' $(MAKEFILE_LIST) | expand --tabs=12

clean: # everything that is built
	rm -rf $(VENV) .venv-oldest .venv-between .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
