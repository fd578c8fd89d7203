# Two commands do everything: `make demo` and `make test`.
# The first Python that will do.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
    $$name -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
# A worker for each core, and one thread to a worker: the tensors of tests are too small for more. A file's tests stay together, for
# they share what is costly to make; those with most tests come first, but for the slow ones, of which single ones take longest.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow lint docs clean

demo: $(VENV)/.installed
	$(BIN)/ctrak demo

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed
	$(PYTEST) --no-loadscope-reorder -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in docs/_build/html; whatever is warned of is an error. Its notebooks are run, with one
# thread: on a busy machine two would spend their time in waiting for each other.
docs: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/doctrees -c docs -b html . docs/_build/html

# With LOCK=.ci/requirements.lock, as .ci/run has it, every package must be the very file whose sha256 is listed there. The list is
# whole, so nothing is resolved: pip would look for `coverage[toml]`, which it takes for another package than the pinned `coverage`.
$(VENV)/.installed: pyproject.toml constraints.txt $(LOCK)
	@test -n "$(PYTHON)" || { echo "No Python from 3.11 to 3.13 was found. Name one: make PYTHON=/path/to/python demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifdef LOCK
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
else
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
endif
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build docs/notebooks/runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
