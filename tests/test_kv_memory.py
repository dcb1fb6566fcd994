"""How large a KV cache may be; a GPU's memory is played by numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import kv_memory
from common.models.architecture import ModelConfig
from common.models.checkpoint import load_config, resolve
from common.testing.parts import module_of

GPU = torch.device("cuda", 1)


class Memory:
    """What torch.cuda says of a GPU on which a step reserves so many bytes, or has no room."""

    def __init__(self, step_bytes: int | None) -> None:
        self.step_bytes, self.reserved, self.peak = step_bytes, 700, 5000
        self.devices: set[torch.device] = set()

    def run(self) -> None:
        if self.step_bytes is None:
            raise torch.OutOfMemoryError("no memory")
        self.reserved += self.step_bytes
        self.peak = max(self.peak, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = 600  # 100 lay idle

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.devices.add(device)
        self.peak = self.reserved

    def memory_reserved(self, device: torch.device) -> int:
        self.devices.add(device)
        return self.reserved

    def max_memory_reserved(self, device: torch.device) -> int:
        self.devices.add(device)
        return self.peak


def test_a_step_takes_what_it_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is in use, whatever was reserved before; on the engine's own GPU."""
    memory = Memory(400)
    monkeypatch.setattr(torch, "cuda", memory)
    assert kv_memory.peak_memory(GPU, memory.run, 8192) == 400
    assert memory.reserved == 600, "it is given back"
    assert memory.devices == {GPU}


def test_a_step_without_room_is_an_error_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = Memory(None)
    monkeypatch.setattr(torch, "cuda", memory)
    with pytest.raises(ValueError, match="8192 tokens: see max_num_batched_tokens"):
        kv_memory.peak_memory(GPU, memory.run, 8192)


def test_nothing_is_run_on_a_cpu() -> None:
    assert kv_memory.peak_memory(torch.device("cpu"), Memory(None).run, 1) == 0


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 30), st.integers(1, 5))
def test_the_largest_counts(num_tokens: int, num_seqs: int, most: int, least: int) -> None:
    """All tokens are given out where sequences may have so many; each has its least."""
    num_tokens = max(num_tokens, least * num_seqs)
    most = max(most, least)
    counts = kv_memory.largest_counts(num_tokens, num_seqs, most, least)
    assert len(counts) == num_seqs and counts == sorted(counts, reverse=True)
    assert sum(counts) == min(num_tokens, most * num_seqs)
    assert least <= counts[-1] and counts[0] <= most
    assert len([count for count in counts if least < count < most]) <= 1


@pytest.mark.parametrize(("prefix_cache", "expected"), [("hash", 5000), ("off", 4 * 8)])
def test_a_gpus_pool_has_room_for_prefixes(prefix_cache: str, expected: int) -> None:
    """What nobody runs may yet be found again; on a CPU the memory is left to others."""
    folder = resolve("random:tiny-llama")
    shape = ModelConfig.from_transformers(load_config(folder), 128)
    block_bytes = 16 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    config = module_of(7, "config").EngineConfig(
        prefix_cache=prefix_cache,
        kv_cache_memory=5000 * block_bytes + 1,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )

    def blocks_on(device: torch.device) -> int:
        return kv_memory.choose_num_blocks(config, shape, torch.float32, device)

    assert (blocks_on(GPU), blocks_on(torch.device("cpu"))) == (expected, 4 * 8)
