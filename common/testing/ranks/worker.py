"""Another rank for the tests of `common.distributed`: it obeys orders, one integer each.

Its config is {"fail": a message with which it ends at the start, "fingerprint": …}, both optional.
"""

import sys
import time
from typing import Any

import torch

from common.distributed import Group, Ranks, run_worker

SUM, REPEAT, SLEEP = 1, 2, 3  # orders


def serve(config: dict[str, Any], ranks: Ranks) -> None:
    if "fail" in config:
        raise ValueError(config["fail"])
    ranks.loaded()
    while numbers := ranks.control.receive():
        obey(numbers, ranks.group)


def obey(numbers: list[int], group: Group) -> Any:
    """What every rank does on an order, rank 0 too."""
    order, *rest = numbers
    if order == SUM:
        return group.all_reduce(torch.full((4,), float(group.rank + 1)))
    if order == REPEAT:
        return repeat(*rest, group)
    if order == SLEEP:
        time.sleep(rest[0] / 1000)
    return None


def repeat(count: int, times: int, group: Group) -> float:
    """Sum so many float32 so often; seconds for one."""
    x = torch.zeros(count)
    group.all_reduce(x)
    begin = time.perf_counter()
    for _ in range(times):
        group.all_reduce(x)
    return (time.perf_counter() - begin) / times


def fingerprint(config: dict[str, Any]) -> dict[str, str]:
    if "fail early" in config:
        raise ValueError(config["fail early"])
    if "stay away" in config:
        time.sleep(3600)
    return config.get("fingerprint", {})


if __name__ == "__main__":
    print("a worker's own words", file=sys.stderr)
    run_worker(serve, fingerprint)
