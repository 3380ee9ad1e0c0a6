# Everything sets itself up: a machine with Python 3.10 to 3.13 and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Folders whose tests run in two processes. Those of the others start several ranks each, or have limits of time.
SIDE_BY_SIDE := tests/chain tests/unit

.PHONY: demo test test-long lint clean

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing (a few minutes; torch is large)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/lesiongen demo

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m "not long" $(foreach folder,$(SIDE_BY_SIDE),--ignore $(folder))

test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
