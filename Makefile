# make demo       install into .venv, then compare formats on the embedded models
# make test       the same installation, then the tests (under 10 minutes on 2 cores)
# make test-full  every test, the long ones too
# make compare-all  formats on every known model into docs/results.md; set MICROSCALE_DATA for all
# make bench      speed beside this machine's limits and beside others, into build/bench
# make lint       style and types
# make clean      remove what was made, .venv included
#
# Needs git, make and Python 3.11 or later. Another interpreter: make PYTHON=/path/to/python demo

VENV ?= .venv
BUILD ?= build
EXTRAS ?= demo,dev
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CORE := CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

# The first of these that runs and is new enough.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo $$python; break; fi; done)

# One thread for each test process: on few cores more threads only wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test test-full compare-all bench lint format install clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	mkdir -p $(BUILD)/demo
	$(BIN)/microscale compare --json $(BUILD)/demo/compare.json --picture $(BUILD)/demo/compare.png

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-full: $(STAMP)
	$(PYTEST)

compare-all: $(STAMP)
	$(BIN)/python runs/compare_all.py --jobs $(JOBS)

# Another process that runs meanwhile spoils figures: what it disturbs is thrown away or marked.
bench: $(STAMP)
	mkdir -p $(BUILD)/bench
	$(BIN)/python benchmarks/run.py --json $(BUILD)/bench/bench.json --picture $(BUILD)/bench/bench.png

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# The environment, and again what is compiled wherever a source of the core changed. Both files are
# written last, so that an installation that was interrupted starts again.
$(STAMP): $(VENV)/environment $(CORE)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/environment: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found: install one, or name it with make PYTHON=/path/to/python" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) $(BUILD) .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
