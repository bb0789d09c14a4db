# Everything a contributor runs, in a virtual environment made here: `make help` lists it.
#
# Finished steps leave a stamp in $(VENV)/.stamps or build/, so a second run redoes only what changed.
SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := $(CURDIR)/.venv
STAMPS := $(VENV)/.stamps
CACHE := .cache
MODEL := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
JOBS ?= $(shell nproc)
GPU_PYTHON ?= 3.12
BUILD_REQUIRES := scikit-build-core nanobind nanobind-backend 'cmake>=3.28' ninja

# CMake, Ninja and the linters of the virtual environment come before the system's.
export PATH := $(VENV)/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
# Without isolation, from a build directory that stays: the next time only what changed is compiled.
PIP_HERE := $(PIP) install --no-build-isolation -c constraints.txt \
  --config-settings build-dir=build/wheel

CXX_SOURCES := $(wildcard cpp/src/*.cpp cpp/src/*/*.cpp tests/cpp/*.cpp bench/*.cpp)
CXX_HEADERS := $(wildcard cpp/include/pie/*.hpp cpp/src/*.hpp cpp/src/*/*.hpp tests/cpp/*.hpp \
  cuda/*.hpp tests/fake_driver/*.hpp)
CUDA_SOURCES := $(wildcard cuda/*.cpp tests/fake_driver/*.cpp tests/cpp/test_cuda*.cpp)
BINDINGS := $(wildcard python/pie/*.cpp)
FORMATTED := $(CXX_SOURCES) $(CUDA_SOURCES) $(CXX_HEADERS) $(BINDINGS) examples/embed/main.cpp
PYTHON_PATHS := $(wildcard python tests/python examples bench)
PYTHON_SOURCES := $(wildcard python/pie/*.py python/pie/*/*.py)
BUILD_FILES := CMakeLists.txt CMakePresets.json pyproject.toml $(wildcard cmake/*)

.PHONY: gpu-check gpu-check-wheels
.PHONY: help demo test lint format sanitizers bench stubs clean
.PHONY: system-packages gtest ctest-release ctest-asan ctest-tsan pytest embed tidy

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

demo: $(STAMPS)/installed $(MODEL) ## Generate text with the KV cache of running requests in a file
	$(VENV)/bin/python examples/demo.py --model $(MODEL)

test: lint ctest-release sanitizers embed pytest ## Run every check there is (the first run takes longest)
	@echo "make test: all passed"

lint: $(STAMPS)/tools tidy ## Check format, types and the lint rules
	clang-format --dry-run -Werror $(FORMATTED)
	ruff format --check $(PYTHON_PATHS)
	ruff check $(PYTHON_PATHS)
	mypy

format: $(STAMPS)/tools ## Rewrite the sources in the project's format
	clang-format -i $(FORMATTED)
	ruff format $(PYTHON_PATHS)
	ruff check --fix $(PYTHON_PATHS)

sanitizers: ctest-asan ctest-tsan ## Run the C++ tests under address+undefined and thread sanitizers

bench: build-release $(STAMPS)/installed $(MODEL) ## Measure this machine: pool reads, attention, models
	@for program in pool_read attention planning adaptive; do \
	  echo; echo "== $$program"; build/release/bench/$$program || exit 1; done
	@for script in bench/*.py; do \
	  echo; echo "== $$script"; $(VENV)/bin/python $$script --model $(MODEL) || exit 1; done

# On a machine that may have no package index: the python3 there has torch, Triton and transformers.
GPU_SITE := build/gpu-site
gpu-check: ## Check and measure on this machine's GPU, with the wheels of gpu-check-wheels
	@mkdir -p build
	python3 -m pip install -q --no-index --no-deps --upgrade --target $(GPU_SITE) build/gpu-wheels/*.whl
	LD_LIBRARY_PATH=build/gpu-wheels PYTHONPATH=$(GPU_SITE):$$PYTHONPATH PIE_TEST_CUDA=build/gpu-wheels/test_cuda \
	  python3 bench/gpu_check.py --report build/gpu-check.json

gpu-check-wheels: build-release ## Fill build/gpu-wheels for a machine with a GPU and no package index
	rm -rf build/gpu-wheels && mkdir -p build/gpu-wheels
	$(PIP) wheel --no-deps --no-build-isolation --config-settings build-dir=build/wheel \
	  -w build/gpu-wheels .
	$(PIP) download --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	  $(foreach n,17 27 28,--platform manylinux_2_$(n)_x86_64) -d build/gpu-wheels \
	  nanobind-backend transformers
	cp build/release/test_cuda build/release/libpie.so build/release/libpie_cuda.so \
	  build/release/libfake_driver.so build/gpu-wheels
	du -sh build/gpu-wheels

stubs: $(STAMPS)/installed ## Regenerate python/pie/_core.pyi from the bindings
	cp build/wheel/_core.pyi python/pie/_core.pyi

clean: ## Remove everything built here (downloads in .cache/ stay)
	rm -rf build dist $(VENV)

# --- environment -------------------------------------------------------------------------------

# What only the system's package manager has. Asked of the compiler, so that any way of installing counts.
has_header = echo '\#include <$(1)>' | c++ -x c++ -std=c++20 -fsyntax-only - 2>/dev/null

system-packages:
	@command -v c++ >/dev/null || { echo "A C++ compiler is needed (Debian: apt-get install g++)"; exit 1; }
	@wanted=; \
	$(call has_header,liburing.h) || wanted="$$wanted liburing-dev"; \
	$(call has_header,xxhash.h) || wanted="$$wanted libxxhash-dev"; \
	$(call has_header,gtest/gtest.h) || wanted="$$wanted libgtest-dev"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || wanted="$$wanted python3-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; \
	sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  wanted="$$wanted python3-dev"; \
	test -z "$$wanted" && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing$$wanted"; export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$wanted >/dev/null; } || \
	    echo "apt-get could not install$$wanted"; \
	else echo "missing system packages; install them with: sudo apt-get install$$wanted"; fi
	@$(call has_header,liburing.h) || \
	  echo "liburing is missing: the pool file will be read by threads instead of io_uring"

gtest: system-packages
	@$(call has_header,gtest/gtest.h) || \
	  { echo "make test needs GoogleTest: sudo apt-get install libgtest-dev"; exit 1; }

$(STAMPS)/venv: | system-packages
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(BUILD_REQUIRES)
	@mkdir -p $(@D) && touch $@

# Uninstalled first, since scikit-build-core imports installed packages with a "cmake.root" entry
# point while it configures: a broken pie would keep itself from being replaced.
$(STAMPS)/installed: $(STAMPS)/venv $(BUILD_FILES) $(BINDINGS) $(PYTHON_SOURCES) \
    $(wildcard cpp/include/pie/*.hpp cpp/src/*.?pp cpp/src/*/*.?pp cuda/*)
	@echo "compiling and installing pie-core and what it depends on"
	@$(PIP) uninstall -y pie-core
	@$(PIP_HERE) ".[hf]"
	@touch $@

$(STAMPS)/tools: pyproject.toml constraints.txt | $(STAMPS)/installed
	@echo "installing the test runners and linters"
	@$(PIP_HERE) ".[dev]"
	@touch $@

$(MODEL): examples/fetch_weights.py | $(STAMPS)/venv
	@echo "fetching weights, 98 MB"
	@$(VENV)/bin/python examples/fetch_weights.py --into $(CACHE)
	@touch $@

# --- checks ------------------------------------------------------------------------------------

# Configures and builds the preset named by the stem; Ninja knows what is out of date.
build-%: gtest | $(STAMPS)/tools
	cmake --preset $* | grep Pie:
	cmake --build --preset $*

ctest-release: build-release
	ctest --preset release -j $(JOBS)

# setarch -R: some kernels place memory where an older ThreadSanitizer cannot have it.
ctest-asan ctest-tsan: ctest-%: build-%
	$$(setarch -R true 2>/dev/null && echo setarch -R) ctest --preset $* -j $(JOBS)

# The build has the double of the driver.
pytest: build-release $(STAMPS)/installed $(STAMPS)/tools $(MODEL)
	$(VENV)/bin/python -m pytest

# A C++ project of somebody else's, built against the installed Python package.
embed: $(STAMPS)/installed
	tests/embed/run $(VENV)/bin/python build/embed

# Without the bindings: the checks take nanobind's idioms for mistakes. What is for CUDA, where it is
# built.
TIDY_SOURCES := $(filter-out $(CUDA_SOURCES),$(CXX_SOURCES)) $(if $(shell command -v nvcc),$(CUDA_SOURCES))
TIDY_STAMPS := $(TIDY_SOURCES:%=build/tidy/%.ok)

tidy: build-release
	@$(MAKE) --no-print-directory -j $(JOBS) $(TIDY_STAMPS)

build/tidy/%.ok: % $(CXX_HEADERS) .clang-tidy
	clang-tidy --quiet -p build/release $<
	@mkdir -p $(@D) && touch $@
