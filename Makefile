# fastddpm: `make sample` and `make test` set everything up by themselves; `make help` lists the rest.
# Needs Linux and Python 3.11 or newer with its venv module. Everything is installed into .venv and nowhere else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints.txt
RESULTS := benchmarks/results
# Test files in up to four processes, the dear ones first (tests/conftest.py names them); the tests of one file stay
# together, since they share what takes long to make.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Another environment that happens to be active, or the user's own site-packages, must not leak in.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_CONSTRAINT
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# Dependencies are pinned, the build backend too: it is installed first and used without build isolation.
INSTALL := $(BIN)/python -m pip install -qq -c $(PINS)

# How far the environment has got. BUSY exists while something is being installed: a run that finds it starts afresh.
BASE := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DOCS := $(VENV)/.installed-docs
BUSY := $(VENV)/.installing

# An environment cannot be moved (its scripts hold absolute paths), nor does it outlive the Python it was made from.
# When either happened, or an install was cut short, the stamps do not count.
define SOUND
test ! -e $(BUSY) && grep -qF "`pwd -P`/$(VENV)" $(BIN)/activate 2>/dev/null \
	&& $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
endef
ifneq ($(shell $(SOUND) && echo sound),sound)
.PHONY: $(BASE) $(TEST) $(DOCS)
endif

.DEFAULT_GOAL := help
.PHONY: help sample test test-all lint types bench gpu train docs install clean

help: ## show this list
	@echo "fastddpm: make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

sample: $(BASE) ## sample 64 digits from the shipped checkpoint into samples/grid.png
	@mkdir -p samples
	@$(BIN)/fastddpm sample mnist --n 64 --solver dpmpp_2m --guidance-scale 1.5 --grid samples/grid.png

test: lint types ## lint, types and the test suite
	@$(BIN)/pytest $(SIDE_BY_SIDE)

test-all: lint types ## the same with the slow tests
	@$(BIN)/pytest --slow $(SIDE_BY_SIDE)

lint: $(TEST) ## ruff: rules and formatting; import-linter: imports go down only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

types: $(TEST) ## mypy, strict
	@$(BIN)/mypy

bench: $(TEST) ## measure beside the peers, 20 minutes; tables, JSON and plots go to benchmarks/results
	@$(BIN)/fastddpm bench --out $(RESULTS)

gpu: ## all that a GPU can tell, in 10 minutes, from .venv if it is there; results go to benchmarks/results/gpu
	@benchmarks/gpu.sh $(RESULTS)/gpu

train: $(BASE) ## train on MNIST: make train DATA=<folder with the idx files>
	@if [ -z "$(DATA)" ]; then \
		echo "make train: DATA must be the folder with MNIST's idx files, got nothing; write make train DATA=<folder>" >&2; exit 2; fi
	@$(BIN)/fastddpm train "$(DATA)" --out runs/mnist --channels 32,64,96 --layers 1 --head-channels 32 \
		--scale-shift --epochs 8 --weights fp16

docs: $(DOCS) ## build the documentation into site/; what mkdocs warns about is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "wrote site/index.html"

install: $(BASE) ## only make .venv and install the package there

clean: ## remove what building, testing and sampling left behind (.venv stays)
	@rm -rf build dist site *.egg-info samples $(RESULTS) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage htmlcov
	@find fastddpm kernels export benchmarks tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(BASE): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make: PYTHON must be Python 3.11 or newer, got $(PYTHON) (`$(PYTHON) --version 2>&1`);" \
			"install one, or name it: make PYTHON=<python> $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "make: $(PYTHON) must have the venv module, got one without;" \
			"install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@$(SOUND) || rm -rf $(VENV)
	@if [ ! -d $(VENV) ]; then echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); fi
	@touch $(BUSY)
	@rm -f $(TEST) $(DOCS)
	@echo "Installing fastddpm and its dependencies into $(VENV), pinned by $(PINS) (a minute or two the first time)"
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation -e .
	@rm -f $(BUSY)
	@touch $@

$(TEST): $(BASE)
	@touch $(BUSY)
	@echo "Installing what the tests need into $(VENV)"
	@$(INSTALL) --no-build-isolation -e '.[test]'
	@$(INSTALL) --no-deps denoising-diffusion-pytorch torch-fidelity
	@rm -f $(BUSY)
	@touch $@

$(DOCS): $(BASE)
	@touch $(BUSY)
	@echo "Installing what the documentation needs into $(VENV)"
	@$(INSTALL) --no-build-isolation -e '.[docs]'
	@rm -f $(BUSY)
	@touch $@
