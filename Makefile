# `make demo` and `make test` do everything on a fresh machine with Python >= 3.10 and a C++
# compiler: virtual environment, pinned dependencies, extension, then the job. What is done already
# is not done again.
#
#   PYTHON=python3.12                 the interpreter the environment is made with
#   TORCH_ARGS="--index-url <url>"    where pip takes torch from; name an index of CPU-only builds
#                                     where the default one would bring the GPU packages
#   ARGS="-k sgd"                     more arguments for the tests or benchmarks
#   JOBS=2                            processes that share the tests, one thread each

PYTHON ?= python3
TORCH_ARGS ?=
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-slow test-all dev ext lint format bench cuda-check info clean

demo: $(VENV)/.built
	$(BIN)/fastmeta demo

test: $(VENV)/.built
	$(PYTEST) -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.built
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow

dev: $(VENV)/.built

# Compiles again even where nothing changed, for instance after an upgrade of torch.
ext: $(VENV)/.deps
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $(VENV)/.built

lint: $(VENV)/.deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

format: $(VENV)/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(VENV)/.built
	$(PYTEST) bench --benchmark-only $(ARGS)

# Needs nvcc, no GPU: every CUDA source for sm_80 and sm_90, with its resource usage.
cuda-check: $(VENV)/.built
	$(PYTEST) tests/test_cuda_compile.py -m "slow or not slow" -s $(ARGS)

info: $(VENV)/.built
	$(BIN)/python -m fastmeta.info

clean:
	rm -rf $(VENV) build dist *.egg-info fastmeta/*.so .pytest_cache .ruff_cache

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) was not found; name a Python >= 3.10 with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: fastmeta needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	       "name another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) install --quiet $(TORCH_ARGS) "$$(grep -i '^torch==' requirements.txt)"
	@touch $@

$(VENV)/.deps: $(VENV)/.torch requirements.txt
	$(PIP) install --quiet -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@
