# make demo | compare | test | lint | bench | clean
# Without an active environment each target makes .venv once and installs requirements.txt into it.
# An active virtual or conda environment is used as it is; PYTHON=/path/to/python overrides both.
ifdef PYTHON
else ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
PYTHON := python
else
PYTHON := .venv/bin/python
SETUP := .venv/.installed
endif

.PHONY: demo compare test lint bench clean

demo: $(SETUP)
	PYTHON=$(PYTHON) bash scripts/demo/pretrain_tats.sh

compare: $(SETUP)
	PYTHON=$(PYTHON) bash scripts/compare/embedded.sh

test: $(SETUP)
	$(PYTHON) -m pytest

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(SETUP)
	$(PYTHON) bench/attention.py
	$(PYTHON) bench/step.py
	$(PYTHON) bench/data.py

clean:
	rm -rf output .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip setuptools wheel
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@
