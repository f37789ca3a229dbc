# Two commands for a new user: `make demo` and `make test`. Each makes .venv, installs, builds, runs.
# `make test` takes minutes; `make test-all` runs every case and takes up to 40 minutes on 2 cores.
# `make test VENV=` uses the current interpreter and downloads nothing.

VENV ?= .venv
PYTHON ?= python3
BIN := $(if $(VENV),$(VENV)/bin/)
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Compiling the CUDA library takes minutes: by default only where there is a GPU to run it on, and
# then as setup.py decides (for a CUDA build of torch, where nvcc is).
export ISSP_CUDA ?= $(if $(wildcard /dev/nvidia0),,0)

# A compiler that is there must succeed; without one the package runs on its slow reference.
export ISSP_NATIVE ?= $(if $(shell command -v g++),1,0)

NATIVE := $(wildcard csrc/*.h csrc/*/* csrc/*/*/*) setup.py
TESTS ?= tests
# Processes of pytest, each with one thread; a single one where pytest-xdist is not installed.
JOBS ?= $(shell $(RUN) -c "import xdist" 2>/dev/null && echo 2)
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest $(addprefix --dist worksteal -n ,$(JOBS))

.PHONY: demo test test-all lint format wheel bench clean

demo: .build-stamp
	$(RUN) -m issp demo

test: .build-stamp $(if $(VENV),lint)
	$(PYTEST) -m "not full" $(TESTS)

test-all: .build-stamp $(if $(VENV),lint)
	ISSP_TEST_FULL=1 $(PYTEST) $(TESTS)

lint: .install-stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(BIN)lint-imports
	$(RUN) -m mypy
	git ls-files csrc tests/kernels/cuda_emulator | grep -E '\.(h|cuh|cpp|cu)$$' | xargs $(BIN)clang-format --dry-run --Werror

format: .install-stamp
	$(RUN) -m ruff format .
	git ls-files csrc tests/kernels/cuda_emulator | grep -E '\.(h|cuh|cpp|cu)$$' | xargs $(BIN)clang-format -i

bench: .build-stamp
	$(RUN) -m issp bench step

# One abi3 wheel: the CPU library, the CUDA library where nvcc exists, any Python from 3.10.
wheel: .install-stamp
	ISSP_CUDA=$(if $(shell command -v nvcc),1,0) $(RUN) -m pip wheel --quiet --no-deps --no-build-isolation -w dist .

.build-stamp: .install-stamp $(NATIVE)
	$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

ifeq ($(VENV),)
.install-stamp:
	@touch $@
else
.install-stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy ninja setuptools wheel
	$(PIP) --no-build-isolation --editable ".[train,test]"
	@touch $@
endif

clean:
	rm -rf build dist .build-stamp .install-stamp issp/*.so *.egg-info
