# Everything here needs Python 3.11 (with venv), make and a C compiler, and nothing else installed.
#
# Variables, on the command line or in the environment:
#   PYTHON       the interpreter that makes .venv (default: python3.11, else python3)
#   TORCH_INDEX  URL of one more package index to look for torch in. Without it, pip takes whichever
#                build of the pinned torch it finds; a CUDA build works on a CPU too, only larger.
#                For the small one: make env TORCH_INDEX=<url of a PyTorch CPU wheel index>
#   DEMO_ARGS    more arguments for the demo, as in: make demo DEMO_ARGS="--iterations 3"
#   PYTEST_ARGS  more arguments for pytest, as in: make test PYTEST_ARGS="-k weights -x"
#   JOBS         processes that tests run in, each with servers of its own (default: 2)
#   VERSIONS     releases for test-versions, as in: make test-versions VERSIONS="0.5.17 0.5.20"

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
TORCH_INDEX ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
VERSIONS ?=

VENV := .venv
IN_VENV := $(VENV)/bin/python
PIP := $(IN_VENV) -m pip --disable-pip-version-check --no-input
PINS := requirements/engine-cpu.txt requirements/dev.txt
# Files of tests are given out whole, since their servers are shared.
IN_PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Written last: its absence means that the environment is not there or not whole.
STAMP := $(VENV)/.complete

# The caller's environment must not leak into this one: another active environment, or a pip that is
# configured to install elsewhere.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PIP_PREFIX PIP_TARGET
export PIP_USER := 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo test test-fast test-rest test-slow test-faults test-versions lint format docs clean clean-env

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	while IFS='|' read -r name what; do printf 'make %-14s %s\n' "$$name" "$$what"; done
	@echo 'Variables: PYTHON, TORCH_INDEX, DEMO_ARGS, PYTEST_ARGS, JOBS, VERSIONS; the top of the Makefile' \
		'says more.'

env: $(STAMP) ## create .venv with the pinned CPU engine, the tools and this package

demo: $(STAMP) ## train a tiny model against a real SGLang server on the CPU
	$(IN_VENV) examples/demo.py $(DEMO_ARGS)

test: $(STAMP) ## run the test suite against a real SGLang server on the CPU
	$(IN_VENV) -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

test-fast: $(STAMP) ## run the tests that need no server, in two minutes at most
	$(IN_VENV) -m pytest test/llm/unit $(IN_PARALLEL) $(PYTEST_ARGS)

test-rest: $(STAMP) ## run what test runs and test-fast does not
	$(IN_VENV) -m pytest --ignore=test/llm/unit $(IN_PARALLEL) $(PYTEST_ARGS)

test-slow: $(STAMP) ## run the tests that need servers of other shapes, or long; writes their report
	TESTS_REPORT=benchmarks/results/slow_tests_cpu.md $(IN_VENV) -m pytest -m slow $(IN_PARALLEL) \
		$(PYTEST_ARGS)

test-faults: $(STAMP) ## every fault at every step of a weight push; writes the table of the docs
	FAULTS_REPORT=benchmarks/results/faults_cpu.md $(IN_VENV) -m pytest \
		$(addprefix test/llm/faults/test_, every_step.py dead_servers.py sharded.py) \
		-m 'faults or not faults' $(PYTEST_ARGS)

test-versions: $(STAMP) ## run the tests against older releases of SGLang too (slow, 3 GB for each)
	VERSIONS='$(VERSIONS)' TORCH_INDEX='$(TORCH_INDEX)' tools/test_versions.sh $(PYTEST_ARGS)

lint: $(STAMP) ## check style, formatting and types
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy

format: $(STAMP) ## fix style and formatting where a tool can
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .

docs: $(STAMP) ## build the documentation into docs/build/html
	$(IN_VENV) -m sphinx -W --keep-going -b html docs/source docs/build/html

clean: ## remove caches and build products; keeps .venv and outputs
	rm -rf build dist *.egg-info docs/build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find torchrl_sglang test examples benchmarks docs -name __pycache__ -prune \
		-exec rm -rf {} + 2>/dev/null || true

clean-env: ## remove .venv
	rm -rf $(VENV)

$(STAMP): $(PINS) requirements/sglang-cpu.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo 'error: no Python 3.11 or newer with the venv module was' \
		'found; install one, or name it: make env PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile --only-binary=:all: $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') \
		$(PINS:%=-r %)
	$(PIP) install --no-compile --only-binary=:all: --no-deps -r requirements/sglang-cpu.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@$(IN_VENV) -c 'import torch; v = torch.version.cuda; v and print( \
		f"note: torch {torch.__version__} is a CUDA {v} build: larger, but it runs on a CPU too")'
	@touch $@
