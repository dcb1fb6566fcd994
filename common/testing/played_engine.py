"""A part's engine, scheduler, caches and host tier, over a device that is played by hand.

Blocks are poisoned when they are given out anew, and what the host tier finds is compared with what
was saved there.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch

from common.models.checkpoint import load_config
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import module_of
from common.testing.played_device import POISON, Copies, Disk, Kv, Runner, contents, expected_output

read_config = lru_cache(load_config)


class Rig:
    """An engine over a played device, which is held against what is known of it at each step."""

    def __init__(
        self, host_blocks: int, disk: Disk | None = None, part: int = 12, **flags: Any
    ) -> None:
        """flags: of the engine; `num_blocks` and `block_size` among them."""
        config = module_of(part, "config").EngineConfig(model="random:tiny-llama", **flags)
        config = config.resolved(torch.device("cpu"), 16)
        kv = Kv(part, config.num_blocks, config.block_size)
        self.copies = Copies(host_blocks if config.offload != "off" else 0, disk, kv)
        self.runner = Runner(config, kv, self.copies)
        engine = module_of(part, "engine")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "load_runner", lambda config, folder: self.runner)
            patch.setattr(engine, "load_config", read_config)
            self.engine = engine.LLMEngine(config)
        self.connector = self.engine.connector
        self.expected: dict[str, list[int]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.meaning: dict[bytes, tuple[int, ...]] = {}  # of keys that blocks were saved under
        self.cached: dict[str, int] = {}
        self.watch_pools()
        self.watch_keys()

    def watch_pools(self) -> None:
        """Poison blocks that are given out."""
        pool = self.runner.kv.pool
        give = pool.allocate

        def allocate(count: int) -> list[int]:
            blocks = give(count)
            self.runner.poison(blocks)
            return blocks

        pool.allocate = allocate
        self.watch_host()

    def watch_host(self) -> None:
        host = self.connector.host
        give = host.allocate

        def allocate(count: int) -> list[int] | None:
            blocks = give(count)
            self.copies.numbers[blocks or []] = POISON
            return blocks

        host.allocate = allocate

    def sleep(self) -> None:
        """Sleep and wake up: nothing is left on the device and on the host."""
        self.engine.sleep(1)
        assert not self.runner.queued and self.copies.orders.empty(), "something is under way"
        self.engine.check_integrity()
        self.runner.kv.numbers[:] = self.copies.numbers[:] = POISON
        self.watch_host()
        self.engine.wake_up()

    def block_contents(self, sequence: Any) -> list[tuple[int, ...]]:
        """Of its full blocks."""
        size, salt = self.runner.kv.block_size, sequence.request.cache_salt
        numbers = contents(sequence.tokens(0, sequence.num_tokens), salt)
        return [tuple(numbers[i : i + size]) for i in range(0, len(numbers) - size + 1, size)]

    def watch_keys(self) -> None:
        """Note what blocks are saved as, and hold what is found against that."""
        connector, size = self.connector, self.runner.kv.block_size
        order, find = connector.order, connector.get_num_new_matched_tokens

        def noted(kind: str, sequence: Any, blocks: list[int], *rest: Any, **more: Any) -> None:
            order(kind, sequence, blocks, *rest, **more)
            if kind == "save" and more.get("keys"):
                whole = self.block_contents(sequence)
                for block, key in zip(blocks, more["keys"], strict=True):
                    numbers = whole[sequence.block_table.index(block)]
                    assert self.meaning.setdefault(key, numbers) == numbers, "one key, two blocks"

        def found(sequence: Any, num_computed: int) -> tuple[int | None, bool]:
            before = (dict(connector.host.of_key), list(connector.host.ref_counts))
            result = find(sequence, num_computed)
            assert find(sequence, num_computed) == result, "asking has changed something"
            assert before == (connector.host.of_key, connector.host.ref_counts)
            if sequence not in connector.swapped:
                known = [key for key in self.meaning if key in connector.host]
                there = {self.meaning[key] for key in known} if connector.keeps_prefixes else set()
                count = 0
                for numbers in self.block_contents(sequence)[num_computed // size :]:
                    if numbers not in there:
                        break
                    count += 1
                most = (sequence.num_cacheable_tokens - num_computed) // size
                assert result[0] == min(count, most) * size, "other than the host has"
            return result

        connector.order, connector.get_num_new_matched_tokens = noted, found

    def add(self, name: str, prompt: list[int], max_tokens: int, **options: Any) -> None:
        salt, stop = options.get("salt"), options.get("stop", ())
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=stop
        )
        request = Request(name, prompt, params, cache_salt=salt)
        self.engine.add_request(request)
        self.expected[name], self.outputs[name] = expected_output(request), []

    def step(self) -> None:
        for output in self.engine.step():
            name = output.request_id
            assert name not in self.reasons, f"{name} goes on after its end"
            self.outputs[name] += output.token_ids
            got = self.outputs[name]
            assert got == self.expected[name][: len(got)], f"{name}: other tokens"
            if output.finish_reason is not None:
                self.reasons[name] = output.finish_reason
                self.cached[name] = output.num_cached_tokens
                complete = self.expected[name] if output.finish_reason != "abort" else got
                assert got == complete, f"{name} has ended early"

    def finish(self) -> None:
        """Steps until all is quiet."""
        for _ in range(3000):
            if not self.engine.has_unfinished():
                break
            self.step()
            self.engine.check_integrity()
        assert not self.engine.has_unfinished(), "it never ends"
        assert set(self.reasons) == set(self.expected)
        stats = self.engine.stats()
        assert stats["num_used_blocks"] == 0 and not self.connector.swapped
        assert not self.connector.transfers and not self.connector.held()
        assert stats["num_used_host_blocks"] == len(self.connector.host.of_key)
        self.check_host()

    def check_host(self) -> None:
        """What can be found and is not on its way is what it was saved as."""
        host = self.connector.host
        for key, block in host.of_key.items():
            if host.ref_counts[block] == 1:
                assert tuple(self.copies.numbers[block]) == self.meaning[key], (
                    "a spoiled host block"
                )
