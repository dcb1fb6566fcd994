"""The ranks behind `parallel collectives`: the same calls in the same order, and rank 0's clock; and
what `parallel engines` asks of the machine beside that.

Rank 0 is a fresh process, `python -m common.bench.parallel.measure`, that reads a JSON job and
answers in JSON. It starts the others as any engine does: `python -m common.bench.parallel.worker`.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from common.distributed.group import Group
from common.distributed.launch import connect
from common.distributed.ranks import Ranks

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "gather", "broadcast")
TIMEOUT = 60.0  # seconds that a rank may be waited for
ROW_SECONDS = 0.02  # of calls in a row that are timed together
MOST_CALLS = 200


def call(group: Group, operation: str, num_bytes: int) -> Callable[[], object]:
    """A function that runs the operation once on float32 tensors; num_bytes as
    `common.bench.parallel.collectives` counts them. A multiple of 4 bytes for each rank."""
    numbers, size = num_bytes // 4, group.size
    whole, part = torch.ones(numbers), torch.ones(numbers // size)
    counts = [numbers // size] * size
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(whole),
        "broadcast": lambda: group.broadcast(whole),
        "all_gather": lambda: group.all_gather(part, counts),
        "gather": lambda: group.gather(part, [(count,) for count in counts]),
        "reduce_scatter": lambda: group.reduce_scatter(whole[: sum(counts)], counts),
        "all_to_all": lambda: group.all_to_all(whole[: sum(counts)], counts, counts),
    }
    if operation == "all_reduce":  # in place: ones would grow without end
        whole.zero_()
    return calls[operation]


def obey(ranks: Ranks) -> None:
    """Another rank: run what rank 0 says, so many times, until it says no more."""
    torch.set_num_threads(1)
    while order := ranks.control.receive():
        number, num_bytes, count = order
        one = call(ranks.group, OPERATIONS[number], num_bytes)
        for _ in range(count):
            one()


def timed(ranks: Ranks, operation: str, num_bytes: int, repeats: int) -> dict[str, Any]:
    """Seconds of a call, the median of `repeats` rows, and what rank 0 gave to others in it."""
    one = call(ranks.group, operation, num_bytes)

    def row(count: int) -> float:
        ranks.control.send([OPERATIONS.index(operation), num_bytes, 1 + count])
        one()  # the others are there when it is done
        start = time.perf_counter()
        for _ in range(count):
            one()
        return (time.perf_counter() - start) / count

    row(5)
    count = max(1, min(MOST_CALLS, int(ROW_SECONDS / row(5))))
    seconds = statistics.median(row(count) for _ in range(repeats))
    before = ranks.group.num_bytes_sent
    row(1)
    sent = (ranks.group.num_bytes_sent - before) // 2
    return {"num_bytes": num_bytes, "seconds": seconds, "sent_bytes": sent}


def collectives_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"transport", "ranks", "sizes", "operations", "repeats"} -> {"operations": {name: points}}."""
    torch.set_num_threads(1)
    config = {"transport": job["transport"]}
    ranks = connect(
        "common.bench.parallel",
        config,
        torch.device("cpu"),
        size=job["ranks"],
        timeout=TIMEOUT,
        fingerprint={},
        use_shared_memory=job["transport"] == "shared_memory",
    )
    try:
        return {
            "operations": {
                name: [timed(ranks, name, size, job["repeats"]) for size in job["sizes"]]
                for name in job["operations"]
            }
        }
    finally:
        ranks.close()


def lone_read_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"threads", "all_threads"} -> {"share"}: how fast so many threads read memory, to how fast all
    do, while nothing else runs. Of a few repetitions the best, in turns."""
    data = torch.ones(1 << 26)  # 256 MiB
    best = {job["threads"]: float("inf"), job["all_threads"]: float("inf")}
    for _ in range(6):
        for threads in best:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            data.sum()
            best[threads] = min(best[threads], time.perf_counter() - start)
    return {"share": min(1.0, best[job["all_threads"]] / best[job["threads"]])}


JOBS = {"collectives": collectives_job, "lone_read": lone_read_job}


def main() -> None:
    job = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr
    json.dump(JOBS[job["job"]](job), answers)
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
