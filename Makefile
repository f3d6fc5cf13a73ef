# make rollout: everything from nothing to a table of real episodes. Nothing is installed twice.
.PHONY: help rollout test fast lint format simpler-setup peers clean
.DEFAULT_GOAL := help

# The tests find TensorFlow here, if `make peers` was run.
export SELFFLOW_TFDS_PYTHON ?= $(wildcard $(CURDIR)/.venv-tfds/bin/python)

# The first Python of a right version that works here; or: make PYTHON=/path/to/python3.12 rollout
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := .venv/bin
# bytecode, wherever the environment forbids it: each test process would compile everything anew
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -q
FAST := 'not slow and not sim'
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q -c constraints.txt

help:
	@echo "make rollout         run the bundled policy in the twin (installs what it needs)"
	@echo "make test            all tests"
	@echo "make fast            the tests that take seconds"
	@echo "make lint            ruff, pyright, layer contracts"
	@echo "make format          let ruff lay the code out"
	@echo "make simpler-setup   install SAPIEN and a software Vulkan driver for backend=simpler"
	@echo "make peers           install what some tests compare with: TensorFlow Datasets, mani-skill, viser, Chromium"
	@echo "make clean           remove .venv and caches; outputs and data stay"

rollout: .venv/base.stamp
	$(BIN)/python eval/simpler_rollout.py task=open_drawer_place

test: .venv/test.stamp
	$(PYTEST) -n 2 --dist worksteal -m $(FAST)
	$(PYTEST) -m 'slow or sim'

fast: .venv/test.stamp
	$(PYTEST) -n 2 --dist worksteal -m $(FAST)

lint: .venv/lint.stamp
	@mkdir -p .view && ln -sfn .. .view/selfflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=.view $(BIN)/lint-imports --no-logo

format: .venv/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

simpler-setup: .venv/base.stamp
	bash envs/simpler_setup.sh

# TensorFlow in a .venv of its own: it pins other versions of what the readers use.
peers: .venv/test.stamp
	$(PIP) -e '.[maniskill,web]'
	test -x .venv-tfds/bin/pip || $(PYTHON) -m venv .venv-tfds
	.venv-tfds/bin/python -m pip install -q -c constraints.txt tensorflow-cpu tensorflow-datasets
	@if command -v chromium >/dev/null; then :; elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; \
	else echo "the tests of web pages want chromium: sudo apt-get install chromium"; fi

clean:
	rm -rf .venv .venv-tfds .view build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# --- installing -----------------------------------------------------------------------------------

INPUTS := pyproject.toml setup.py constraints.txt

.venv/base.stamp: $(INPUTS) | .venv/bin/pip
	@echo "installing selfflow and what it needs into .venv (minutes the first time)"
	@$(PIP) -e .
	@touch $@

.venv/test.stamp: .venv/base.stamp
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]'
	@touch $@

.venv/lint.stamp: .venv/test.stamp
	@echo "installing ruff, pyright and import-linter"
	@$(PIP) -e '.[lint]'
	@touch $@

# Debian's python3 comes without ensurepip, which python3-venv brings.
# (pip is the last thing that venv makes: a broken-off .venv is made again.)
.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 here; install one, or make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m ensurepip --version >/dev/null 2>&1 || { \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing $$package"; \
			apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $$package >/dev/null; \
		else echo "this Python cannot make a .venv; type: sudo apt-get install $$package"; exit 1; fi; }
	@$(PYTHON) -m venv .venv
