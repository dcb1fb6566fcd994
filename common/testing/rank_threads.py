"""Engines whose ranks are threads of this process: all of a rank but its start, in milliseconds.

The ranks meet in the same shared memory that processes would use, and hear rank 0 through queues. A
process for each costs seconds, most of them for imports; what is computed does not depend on it.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from common.distributed import Ranks, connect
from common.distributed.control import Control
from common.distributed.health import Health
from common.distributed.shared_memory import SharedMemoryGroup, make_memory
from common.distributed.stages import join_stages, members_of
from common.models.checkpoint import resolve
from common.testing.parts import module_of

TIMEOUT = 20.0  # seconds, of every wait


class QueueControl(Control):
    """Rank 0's side if it has queues of others, else another rank's."""

    def __init__(self, own: queue.Queue | None, others: list[queue.Queue]) -> None:
        self.own, self.others = own, others
        self.sent: list[list[int]] = []

    def send(self, numbers: list[int]) -> None:
        assert numbers and all(type(number) in (int, bool) for number in numbers), numbers
        self.sent.append(numbers)
        for other in self.others:
            other.put(list(map(int, numbers)))

    def receive(self) -> list[int]:
        assert self.own is not None
        return self.own.get()

    def close(self) -> None:
        for other in self.others:
            other.put([])


class ThreadRanks:
    """Stands in for `connect`: starts ranks 1, 2, … as threads. `runners` are theirs."""

    def __init__(self, part: int) -> None:
        self.part = part
        self.runners: dict[int, Any] = {}
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def connect(self, package: str, config: dict, device: torch.device, **more: Any) -> Ranks:
        size, cpu = more["size"], torch.device("cpu")
        if size == 1:
            return connect(package, config, device, **more)
        healths, num_stages = [Health() for _ in range(size)], more.get("num_stages", 1)
        groups: dict[tuple[str, int], SharedMemoryGroup] = {}
        for name, of in ({"data": list(range(size))} | members_of(num_stages, size)).items():
            memory = make_memory(len(of))
            for place, rank in enumerate(of):
                where = memory, place, len(of), TIMEOUT, healths[rank], 0, of, size
                groups[name, rank] = SharedMemoryGroup(*where)
            os.close(memory)
        queues: list[queue.Queue] = [queue.Queue() for _ in range(1, size)]
        controls = [QueueControl(None, queues), *(QueueControl(own, []) for own in queues)]
        everyone = [groups["data", rank] for rank in range(size)]
        ranks = [Ranks(r, size, everyone[r], controls[r], cpu, 1, healths[r]) for r in range(size)]

        def divide(own: Ranks) -> None:
            own.divide(
                join_stages(num_stages, own.rank, own.group, lambda n, _: groups[n, own.rank])
            )

        for other in ranks[1:]:
            thread = threading.Thread(target=self.serve, args=(config, other, divide), daemon=True)
            self.threads.append(thread)
            thread.start()
        divide(ranks[0])
        return ranks[0]

    def serve(self, config: dict[str, Any], ranks: Ranks, divide: Callable[[Ranks], None]) -> None:
        try:
            divide(ranks)
            settings = module_of(self.part, "config").EngineConfig(**config)
            runner = module_of(self.part, "model_runner").ModelRunner(
                settings, resolve(settings.model), ranks
            )
            self.runners[ranks.rank] = runner
            module_of(self.part, "ranks").follow(runner)
        except BaseException as error:
            self.errors.append(error)
            ranks.health.report(str(error))


def engine_in_threads(part: int, model: str, size: int, **flags: Any) -> tuple[Any, ThreadRanks]:
    """An engine of a part whose other ranks are threads, to be ended by `shutdown`, and these. size:
    ranks of a stage."""
    others = ThreadRanks(part)
    config = module_of(part, "config").EngineConfig(
        model=model, tensor_parallel_size=size, threads=1, **flags
    )
    with patch.object(module_of(part, "ranks"), "connect", others.connect):
        engine = module_of(part, "engine").LLMEngine(config)
    while (
        len(others.runners) < size * flags.get("pipeline_parallel_size", 1) - 1
        and not others.errors
    ):
        time.sleep(0.001)  # the last of them leave their constructor
    return engine, others
