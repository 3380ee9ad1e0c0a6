# Everything sets itself up: a machine with Python 3.10 to 3.13 and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

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
	$(BIN)/python -m pytest -m "not long"

test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
