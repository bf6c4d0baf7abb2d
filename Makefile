# What can be done here, each target one thing. Only Python 3.11+ and make are needed: everything else goes into .venv.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
MODEL ?= models/tiny-q8_0.gguf
PROMPT ?= Once upon a time
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: run test lint fmt bench bench-quick clean

# Write a story with the bundled model: make run PROMPT="The dragon" ARGS="-n 60 --seed 3"
run: .venv/installed
	$(BIN)/cmr-run $(MODEL) -p "$(PROMPT)" -n 200 $(ARGS)

# Run the tests: make test ARGS="-k chat"
test: .venv/installed-test
	$(BIN)/python -m pytest $(ARGS)

# Check style and types; changes nothing
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Put the code into the house's format
fmt: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Measure this machine and write BENCHMARKS.md: speed, start, memory, small tasks, every plugin; up to 15 minutes on two
# cores. Parts of it: make bench ARGS="--only plugins"; another shape: ARGS="--shape llama-3-8b"
bench: .venv/installed
	$(BIN)/python tools/bench_all.py $(ARGS)

# The same in 2 minutes, speed alone, written to models/
bench-quick: .venv/installed
	$(BIN)/python tools/bench_all.py --set quick -o models/bench-quick.md $(ARGS)
	@cat models/bench-quick.md

# Remove what the targets above made
clean:
	rm -rf .venv build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache runner/*.egg-info
	find runner plugins tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the virtual environment: one stamp for each set of packages, renewed when pyproject.toml changes --

.venv/created:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created pyproject.toml
	$(PIP) --only-binary :all: --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) --only-binary :all: --editable ".[test]"
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --only-binary :all: --editable ".[dev]"
	@touch $@
