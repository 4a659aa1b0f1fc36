# `make demo` and `make test` set up everything they need in .venv; nothing outside this folder is touched.
# Python: that of an existing .venv, else the newest that runs and can make environments (a name on PATH may be a
# version manager's stub for a version that is not selected), or PYTHON=...
CAN_MAKE_VENV := -c 'import venv, ensurepip'
PYTHON ?= $(shell for python in .venv/bin/python python3.13 python3.12 python3.11; do \
	$$python $(CAN_MAKE_VENV) 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
READY := .venv/.ready
RUN := runs/demo
JOBS ?= 3

.PHONY: demo test test-fast slow-list lint docs setup clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) $(CAN_MAKE_VENV) || \
		{ echo "no Python 3.11 to 3.13 with venv here: install one, or set PYTHON=... (now: $(PYTHON))"; exit 1; }
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

# In JOBS processes at a time, one more than two cores: a third of the time is waiting. Each takes up to 3 GB. Hundreds of
# processes start: they share byte code, also where a shell says not to write any.
test test-fast slow-list: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The edit loop: without the tests of over 0.3 seconds, which tests/slow.txt lists.
test-fast: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" -q

# Measure every test anew and write tests/slow.txt, on a quiet machine.
slow-list: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --write-slow

# The same commands as in .pre-commit-config.yaml.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ and the API from docstrings -> build/docs/index.html. Warnings are errors; nothing is fetched.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf .venv runs data build *.egg-info
