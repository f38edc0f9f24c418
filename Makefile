# The one task runner: people, hooks and CI call it. `make` lists what there is.

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STUDENTS ?=
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Four at a time, also on two cores, since they wait too. Files in the order of tests/conftest.py: the longest first.
PARALLEL := -n 4 --dist loadfile --no-loadscope-reorder

export PATH := $(BIN):$(PATH)
# Disable telemetry in every tool.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true
export HF_HUB_DISABLE_TELEMETRY := true
export ITERATIVE_DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export NO_ALBUMENTATIONS_UPDATE := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# Without bytecode each process compiles what it imports anew: 11 s instead of 5 s for training.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo serve join repro test test-fast test-team lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed ## make .venv from requirements.lock, if it is missing or older

# uv installs in seconds what takes pip minutes; it looks where pip is told to look. It compiles on all cores what the first command
# would compile on one. torch comes first, with what its build for this machine needs (a CUDA build brings its own libraries). The lock
# names every other package, so nothing more is resolved: `dataclasses`, a backport that img2dataset asks for, would hide the standard
# library's from Prefect's server.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "make: $(PYTHON) is not Python 3.11 or 3.12: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing the locked packages into $(VENV): some gigabytes, about a minute, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(UV) -c requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(UV) --no-deps -r requirements.lock
	$(UV) --no-deps --no-build-isolation --editable .
	@touch $@

demo: install ## the whole pipeline for all students at the demo profile, on a CPU (STUDENTS=... for some)
	@env -u PREFECT_API_URL -u PREFECT_API_KEY $(BIN)/python -m flows.distill --profile demo $(STUDENTS)

serve: install ## Prefect (server, worker, deployments) and MLflow's UI on loopback (PREFECT_PORT=4200 MLFLOW_PORT=5000)
	@$(BIN)/python -m flows.serve --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

join: install ## this machine joins a pool of a team's server (POOL=gpu SERVER=http://HOST:4200/api)
	@$(BIN)/python -m flows.join --pool $(POOL) $(if $(SERVER),--server $(SERVER))

repro: install ## the pipeline by DVC alone, at the profile that params.yaml names
	@$(BIN)/dvc repro

test: lint ## all checks and all tests
	$(PYTEST) $(PARALLEL)

test-fast: install ## the tests that start no process of their own
	$(PYTEST) $(PARALLEL) -m "not slow and not team"

test-team: install ## the tests that play several machines, and take minutes
	$(PYTEST) -m team tests/flows

lint: install ## style, types, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

format: install ## put the style right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches, and artifacts that `dvc checkout` brings back; releases and unfinished work stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dvc_plots *.egg-info
	find koala flows tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find artifacts -mindepth 2 -maxdepth 2 ! -name publish -exec rm -rf {} + 2>/dev/null || true
