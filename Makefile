# Six verbs: run, test, lint, bench, docs, pyz. Each makes what it needs in .venv; nothing is installed elsewhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NODE := tests/node/node_modules
HOST ?= 127.0.0.1
PORT ?= 8080
# How many processes run tests; `auto`: one for each core.
JOBS ?= auto
PYZ_PYTHONS ?= 3.11 3.12 3.13 3.14

.PHONY: run test lint bench docs pyz clean
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

# Clients that tests run: Codex and the libraries of Node. Without npm these tests are skipped.
$(NODE)/.package-lock.json: tests/node/package.json tests/node/package-lock.json
	@if command -v npm >/dev/null; then echo "npm ci --prefix tests/node"; \
	npm ci --prefix tests/node --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@; \
	else echo "There is no npm: tests of Codex and of Node clients are skipped."; fi

$(VENV)/pyz.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[pyz]'
	touch $@

ifdef UPSTREAM
run: $(VENV)/run.stamp
	$(BIN)/python proxy.py --upstream $(UPSTREAM) --host $(HOST) --port $(PORT)
else
run: $(VENV)/demo.stamp
	$(BIN)/python demo/run.py --host $(HOST) --port $(PORT)
endif

test: $(VENV)/test.stamp $(NODE)/.package-lock.json
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --cov --cov-report term:skip-covered --cov-fail-under 95

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

# Compiled parts carry the Python that they are for in their names, so those for several Pythons fit into one folder. What
# pip wrote about our own wheel names this folder; as the wheel has it, the same packages give the same bytes anywhere.
pyz: export SOURCE_DATE_EPOCH ?= 1767225600
pyz: $(VENV)/pyz.stamp
	rm -rf build
	mkdir -p build/pyz/all dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/pyz .
	set -e; for version in $(PYZ_PYTHONS); do \
	  $(BIN)/python -m pip install --quiet --no-compile --only-binary=:all: --python-version $$version \
	    --target build/pyz/$$version "$$(echo build/pyz/*.whl)[pdf,postgres]"; \
	  cp -R build/pyz/$$version/. build/pyz/all; \
	done
	rm -r build/pyz/all/bin build/pyz/all/responses_proxy-*.dist-info
	$(BIN)/python -m zipfile --extract build/pyz/*.whl build/pyz/all
	$(BIN)/shiv --reproducible --site-packages build/pyz/all --console-script responses-proxy \
	  --output-file dist/responses-proxy.pyz
	$(BIN)/python -m pytest tests/test_pyz.py

clean:
	rm -rf $(VENV) $(NODE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
