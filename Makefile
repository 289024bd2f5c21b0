# Five verbs: run, test, lint, bench, docs. Each makes what it needs in .venv; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8080

.PHONY: run test lint bench docs clean
.DEFAULT_GOAL := run

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of packages, so that `make run UPSTREAM=...` installs only what it runs.
$(VENV)/run.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[pdf]'
	touch $@

$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[pdf,demo]'
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	touch $@

ifdef UPSTREAM
run: $(VENV)/run.stamp
	$(BIN)/python proxy.py --upstream $(UPSTREAM) --host $(HOST) --port $(PORT)
else
run: $(VENV)/demo.stamp
	$(BIN)/python demo/run.py --host $(HOST) --port $(PORT)
endif

test: $(VENV)/test.stamp
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report --fail-under=95

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/matrix.py --check
	$(BIN)/python docs/openapi.py --check

docs: $(VENV)/test.stamp
	$(BIN)/python docs/matrix.py
	$(BIN)/python docs/openapi.py

bench: $(VENV)/test.stamp
	$(BIN)/python bench/run.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
