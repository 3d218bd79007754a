# make demo | compare | test | test-slow | lint | bench | gpu | clean
# Without an active environment each target makes .venv once and installs the requirements*.txt into it, in the exact
# versions of constraints.txt; CONSTRAINTS= installs the newest ones that they allow.
# An active virtual or conda environment is used as it is; PYTHON=/path/to/python overrides both.
# VENV=.venv-3.13 BASE_PYTHON=python3.13 make a second environment beside it, of another Python.
# TESTS="tests/unit/test_ppo.py" runs some of the tests.
VENV ?= .venv
BASE_PYTHON ?= python3
REQUIREMENTS := requirements.txt requirements-extra.txt requirements-dev.txt
CONSTRAINTS ?= constraints.txt
ifdef PYTHON
else ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
PYTHON := python
else
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif

.PHONY: demo compare test test-slow lint bench gpu clean

demo: $(SETUP)
	PYTHON="$(PYTHON)" bash scripts/demo/pretrain_tats.sh

compare: $(SETUP)
	PYTHON="$(PYTHON)" bash scripts/compare/embedded.sh

test: $(SETUP)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# Kills, full disks and vanishing videos, again and again: some 15 minutes.
test-slow: $(SETUP)
	$(PYTHON) -m pytest -n 2 --dist loadfile -m slow

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(SETUP)
	$(PYTHON) bench/attention.py
	$(PYTHON) bench/step.py
	$(PYTHON) bench/data.py

# PART=1: only the tests; 2: steps, layers, loader; 3: --compile, memory, sizes. DRY_RUN=1: on the CPU, tiny.
gpu: $(SETUP)
	$(PYTHON) bench/gpu.py $(if $(PART),--part $(PART)) $(if $(DRY_RUN),--dry_run)

# Caches. output/, where runs are written, stays.
clean:
	rm -rf output/gpu .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/.installed: $(REQUIREMENTS) $(CONSTRAINTS) pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 15) else \
	    "error: Python %d.%d: this needs 3.11 to 3.14; name one as BASE_PYTHON=python3.12" % v)'
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip setuptools wheel
	$(VENV)/bin/pip install --quiet $(REQUIREMENTS:%=-r %) $(CONSTRAINTS:%=-c %)
	touch $@
