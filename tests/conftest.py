"""Settings for every test: quiet libraries, hypothesis without deadlines on noisy machines, the order of
files, and a collector of garbage that does not look at them again and again."""

import functools
import gc
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
# torch's idle threads spin by default. With servers, workers and tests on two cores that turns a
# step of 30 ms into one of seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import httpx._transports.default as httpx_transport
import pytest
from hypothesis import HealthCheck, settings

# httpx reads a bundle of certificates for each call that brings no client of its own: 25 ms, and no
# test asks a server by https.
if hasattr(httpx_transport, "create_ssl_context"):
    httpx_transport.create_ssl_context = functools.cache(httpx_transport.create_ssl_context)

# Collecting makes half a million objects that stay: each full collection of garbage on the way would
# look at all of them.
gc.disable()
# With this package jsonschema, which nbformat and schemathesis import, builds 38 parsers for formats
# that nothing here has: 2 s in each worker.
sys.modules["rfc3987_syntax"] = None

settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("house")


# Files that take longest, the longest first: two workers that take whole files (`--dist loadfile
# --no-loadscope-reorder`) then end at about the same time.
LONGEST = (
    "test_part15_core", "test_notebooks", "test_part15_matrix", "test_part15_pipeline", "test_part09_faults", "test_contract", "test_distributed", "test_lifecycle",
    "test_part15_tools", "test_gpu_check", "test_kernel_cache", "test_part10_processes", "test_triton_kernels",
    "test_part11_router", "test_part11_engines", "test_part10_ray", "test_http_input",
    "test_openai_client", "test_part08", "test_part14", "test_schedules", "test_part13_soak", "test_soak",
    "test_part15_graphs", "test_part15_structured", "test_bench_attribution",
    "test_memory", "test_inspector_replay", "test_inspector", "test_inspector_engine", "test_metrics",
    "test_model_files_own", "test_part08_units", "test_moe", "test_part03", "test_kernels",
    "test_bench_speculative", "test_bench_router", "test_bench_parallel", "test_bench", "test_cli",
    "test_bench_ladder", "test_bench_prefix", "test_upcycle",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end. Without this each full collection, and some tests ask for
    dozens, would take up to a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A small byte-level tokenizer of one's own: no model is needed."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({text: i + 2 for i, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return backend.to_str()
