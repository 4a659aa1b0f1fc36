# `make demo` and `make test` set up everything they need in .venv; nothing outside this folder is touched.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
RUN := runs/demo

.PHONY: demo test lint setup clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed (or set PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing the locked packages into .venv (about 7 GB, some minutes) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

# Fetch digits, train for about four minutes, evaluate the checkpoints, write the report. Run it again and it goes on
# from where it was.
demo: $(READY)
	test -d data/mnist5k || $(BIN)/tarflow data fetch mnist5k data/mnist5k
	$(BIN)/tarflow train configs/demo.yaml --run-dir $(RUN)
	$(BIN)/tarflow evaluate $(RUN) --once
	$(BIN)/tarflow report $(RUN)

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs data build *.egg-info
