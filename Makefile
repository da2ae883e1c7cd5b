# The two commands: `make demo` and `make test`, from a bare clone with Python 3.11+, g++ and make.
#
# When `python3` (an active virtual or conda environment, or the system's) has torch, it is used as it is: packages that
# are missing are added, torch is left alone. Otherwise a virtual environment is made in .venv.
#
#   make demo ARGS="--cell gru"      train twice and compare; arguments go to `python -m fastrnn demo`
#   make test ARGS="-k lstm"         the suite, two tests at a time; arguments go to pytest (-n 0: one at a time)
#   make lint                        ruff and clang-format
#   make build                       compile what changed
#   make clean                       remove everything that was made, .venv included
#
#   PYTHON=python3.12                the Python to use
#   TORCH_VERSION=2.11.0             the torch of a new .venv
#   CXX, CXXFLAGS, MAX_JOBS          as everywhere
#   FASTRNN_CUDA=0                   no CUDA kernels; 1: an error without nvcc; auto: they are built where nvcc is found
#   TORCH_CUDA_ARCH_LIST             their architectures, as everywhere; CUDA_HOME: the toolkit, else the nvcc on PATH

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
ARGS ?=
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

# .venv, once made, goes before the system's Python, but not before an environment that the user activated.
ours := $(shell test -x .venv/bin/python && test -z "$$VIRTUAL_ENV$$CONDA_PREFIX" && echo yes)
given := $(if $(ours),,$(shell $(PYTHON) -c 'import torch, sys; print(sys.executable)' 2>/dev/null))
python := $(or $(given),.venv/bin/python)

# What is done already, for this environment and this torch.
ifdef given
stamps := build/stamps/$(shell $(given) -c 'import sys, torch, zlib; print(f"{zlib.crc32(sys.prefix.encode()):08x}-torch-{torch.__version__}")')
build_tools := 'setuptools>=77' 'ninja>=1.11' 'pybind11>=3'
else
stamps := .venv/stamps/torch-$(TORCH_VERSION)
build_tools := $(shell sed -n '/^requires = /{s/.*\[//;s/\].*//;s/[",]/ /g;p;}' pyproject.toml | tr ' ' '\n' | grep -v '^torch')
endif

pip := $(python) -m pip --disable-pip-version-check --quiet install
# The packages of one group of [project.optional-dependencies]; torch is in none, so it is never replaced.
group = $(python) -c 'import tomllib; \
  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")'

.PHONY: help demo test lint build clean check-tools
help:
	@sed -n '/^# The two/p; s/^#   //p' Makefile

demo: $(stamps)/install $(stamps)/demo
	@$(python) -m fastrnn demo $(ARGS)

# Two tests at a time, on two threads or more each: threads of torch that wait spinning would only be in the way.
test: export OMP_WAIT_POLICY ?= passive
test: $(stamps)/install $(stamps)/demo $(stamps)/test
	@$(python) -m pytest -n 2 $(ARGS)

lint: $(stamps)/lint
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \) -print0 | PATH="$$( \
	  $(python) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" \
	  xargs -0 clang-format --dry-run --Werror
	@echo "lint: no complaints"

# Asked every time: ninja knows what changed, headers included, and is done at once when nothing did.
build: $(stamps)/tools
	@echo "Compiling what changed (everything takes a few minutes on two cores)"
	@$(python) -W ignore setup.py --quiet build_ext --inplace

$(stamps)/torch: | check-tools
ifdef given
	@echo "Using $(python), which has torch"
else
	@echo "Making a virtual environment in .venv and installing torch $(TORCH_VERSION): a large download"
	@$(PYTHON) -m venv .venv && rm -rf .venv/stamps
	@$(pip) 'torch==$(TORCH_VERSION)'
endif
	@mkdir -p $(stamps) && touch $@

$(stamps)/tools: $(stamps)/torch
	@echo "Installing the build tools"
	@$(pip) $(build_tools)
	@touch $@

$(stamps)/install: pyproject.toml | build
	@echo "Installing fastrnn in place"
	@$(pip) --no-build-isolation --no-deps -e .
	@touch $@

$(stamps)/demo $(stamps)/test $(stamps)/lint: pyproject.toml | $(stamps)/torch
	@echo "Installing what '$(notdir $@)' needs"
	@$(call group,$(notdir $@)) | $(pip) -r /dev/stdin
	@touch $@

check-tools:
	@$(or $(given),$(PYTHON)) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: python3 must be Python 3.11 or newer (or set PYTHON=...)" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo "error: no C++ compiler: install g++ (Debian, Ubuntu: apt install g++), or set CXX" >&2; exit 1; }

clean:
	@rm -rf build dist .venv fastrnn.egg-info fastrnn/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -prune -exec rm -rf {} +
