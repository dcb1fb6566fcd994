"""Sleep: an engine that has nothing to do gives its memory back, and keeps its process.

A start takes seconds: imports, kernels, reading and packing the weights, a warm-up. Of all this a
sleeping engine loses only the bytes.

    awake --sleep(1)--> the weights are in a file (of a GPU: in the host's memory) --sleep(2)--.
      ^ ^------------------- wake_up copies them back ---'                                     v
      '--------------------- wake_up reads the checkpoint again ------- the weights are nowhere

What the KV cache holds is dropped at both levels. A sequence that runs is preempted, and recomputes
its prompt and output when it joins again; a request that comes meanwhile waits in the queue.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from common.distributed import RankError
from common.distributed.ranks import LOAD_SECONDS
from common.memory.errors import SleepError
from common.memory.process import held_bytes, release_unused
from common.memory.tensors import Memory, find_tensors, memory_of

SLEEPS = 3  # in a header to other ranks, in the place of what runs


class RankSleep:
    """One rank's sleep. It belongs to the device: only work in the queue touches it."""

    def __init__(self, runner: Any) -> None:
        """runner: a part's ModelRunner. `sources` has its models, `reload` reads one anew."""
        self.runner, self.level = runner, 0
        self.weights: Memory | None = None
        caches = [runner.kv.data]
        if runner.kv.draft_data is not None:
            caches.append(runner.kv.draft_data)
        if runner.device.type == "cpu":  # a GPU would go on writing to pinned memory that is gone
            caches += [host for _, host in runner.connector.pairs]
        self.kv = memory_of(caches, runner.device)
        self.held: list[list[int]] = []  # bytes of each rank before and after; on rank 0

    def order(self, level: int) -> None:
        """Rank 0: let every rank sleep at this level; 0: wake up. Raises SleepError, RankError."""

        def run() -> Any:
            order = [SLEEPS, level, self.runner.connector.num_copied]
            self.runner.ranks.control.send([*self.runner.queue.counts, *order])
            return self.become(level)

        self.runner.queue.aside(run).result()

    def follow(self, level: int) -> Any:
        """Another rank: as rank 0 has said. If that fails, rank 0 knows."""
        try:
            return self.become(level)
        except SleepError:
            return self.runner.nothing()

    def become(self, level: int) -> Any:
        """What the device does. Raises SleepError on every rank when it cannot be done on one."""
        runner, before = self.runner, held_bytes(self.runner.device)
        runner.ranks.group.limit_waits(LOAD_SECONDS)  # one rank may have a slower disk
        if level == 0:
            self.agree(self.restore)
        elif self.level == 0:
            self.discard(level)
        elif self.weights is not None:
            self.weights.forget()
        self.level = level
        if level:
            release_unused()
        held = torch.tensor([before, held_bytes(runner.device)], device=runner.device)
        gathered = runner.ranks.group.gather(held, [held.shape] * runner.ranks.size)
        self.held = [numbers.tolist() for numbers in gathered or []]
        runner.ranks.loaded()
        return runner.nothing()

    def discard(self, level: int) -> None:
        """Nothing is dropped before every rank has its copy."""
        tensors = [
            t for model in self.runner.sources for t in find_tensors(model, type(model).__module__)
        ]
        self.weights = memory_of(tensors, self.runner.device)
        if level == 1:
            try:
                self.agree(self.weights.save)
            except SleepError:
                self.weights.forget()
                raise
        if (graphs := getattr(self.runner, "graphs", None)) is not None:
            graphs.forget()
        self.weights.discard()
        self.kv.discard()

    def restore(self) -> None:
        if self.level == 1 and self.weights is not None:
            self.weights.restore()
        elif self.level == 2:
            for model in list(self.runner.sources):
                self.runner.reload(model)
        self.kv.restore()

    def agree(self, attempt: Callable[[], None]) -> None:
        """Raises SleepError on every rank when an attempt fails on one."""
        error: Exception | None = None
        try:
            attempt()
        except torch.AcceleratorError:
            raise
        except (OSError, ValueError, RuntimeError) as failed:  # disk, checkpoint, memory
            error = failed
        if not self.runner.ranks.group.minimum(int(error is None)):
            self.runner.ranks.loaded()
            reason = "it failed on another rank" if error is None else str(error).partition("\n")[0]
            raise SleepError(reason) from error


def fall_asleep(engine: Any, level: int) -> dict[str, Any]:
    """See `LLMEngine.sleep`."""
    if level not in (1, 2):
        raise ValueError(f"level must be 1 or 2, not {level!r}")
    size, was = engine.config.data_parallel_size, engine.sleep_level
    if size > 1:
        raise SleepError(f"data_parallel_size is {size}: the other engines need these experts")
    if level <= was:
        return {}
    engine.sleep_level = level  # from now on nothing is scheduled
    try:
        if was == 0:
            put_down(engine)
        return change(engine, level)
    except BaseException:
        engine.sleep_level = was
        raise


def wake_up(engine: Any) -> dict[str, Any]:
    """See `LLMEngine.wake_up`."""
    if engine.sleep_level == 0:
        return {}
    begin = time.perf_counter()
    told = change(engine, 0)
    engine.sleep_level = 0
    if (graphs := getattr(engine.runner, "graphs", None)) is not None:
        graphs.wake_up(engine.runner)
    return told | {"seconds": round(time.perf_counter() - begin, 3)}


def put_down(engine: Any) -> None:
    """Wait for what is under way; then no sequence runs, and no block is in use."""
    if (drop := getattr(engine.connector, "drop", None)) is not None:
        drop()  # what waits for other engines
    finish(engine)
    for sequence in reversed(list(engine.scheduler.running)):
        engine.scheduler.preempt(sequence)
    finish(engine)  # copies to the host
    engine.connector.forget()
    if held := engine.connector.held():
        raise SleepError(f"{sum(map(len, held))} blocks are needed by other engines yet")
    engine.scheduler.forget_cache()


def finish(engine: Any) -> None:
    """Read the steps in flight, and wait for copies. What they bring is returned by the next step."""
    outputs = []
    try:
        while engine.in_flight or engine.connector.is_busy:
            outputs += engine.step()
    except (torch.AcceleratorError, RankError):
        raise
    except Exception as error:
        engine.fail_step()
        raise SleepError("a step failed") from error
    finally:
        engine.outbox[:0] = outputs


def change(engine: Any, level: int) -> dict[str, Any]:
    """Returns how long it took, and the bytes that all ranks hold now and held before."""
    begin, sleep = time.perf_counter(), engine.runner.rank_sleep
    sleep.order(level)
    before, after = map(sum, zip(*sleep.held, strict=True))
    seconds = round(time.perf_counter() - begin, 3)
    return {"seconds": seconds, "bytes_before": before, "bytes_after": after}
