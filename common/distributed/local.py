"""The ranks of an engine on one host: rank 0 starts the others as its children.

They meet in a store that is a file without a name, and hear rank 0 through pipes: no port is open.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed import Store

from common.device import usable_cores
from common.distributed.children import Children, read_job
from common.distributed.control import PipeReceiver, PipeSender
from common.distributed.gloo import TorchGroup, make_backend
from common.distributed.group import Group, OneRank
from common.distributed.health import Health
from common.distributed.ranks import Ranks
from common.distributed.rendezvous import LocalStore, meet, open_store
from common.distributed.shared_memory import SharedMemoryGroup

LOOPBACK = "127.0.0.1"


def start_local(
    package: str,
    config: Mapping[str, Any],
    device: torch.device,
    size: int,
    timeout: float,
    fingerprint: Mapping[str, str],
    start_timeout: float,
    memory: int | None,
) -> Ranks:
    """Rank 0. memory: see `shared_memory.make_memory`; closed here. Raises ValueError, RankError."""
    first = device.index or 0
    if device.type == "cuda" and first + size > torch.cuda.device_count():
        num_gpus = torch.cuda.device_count()
        raise ValueError(f"{size} ranks from {device} on, but torch sees {num_gpus} GPUs")
    health, threads = Health(), max(1, usable_cores() // size)
    local = LocalStore(size)
    pipes = [os.pipe() for _ in range(1, size)]
    jobs, descriptors = [], []
    for rank, (end, _) in enumerate(pipes, 1):
        jobs.append(
            {
                "config": config,
                "rank": rank,
                "size": size,
                "device": "cpu" if device.type == "cpu" else f"cuda:{first + rank}",
                "threads": threads,
                "timeout": timeout,
                "start_timeout": start_timeout,
                "parent": os.getpid(),
                "store": local.path,
                "memory": memory,
                "control": end,
            }
        )
        descriptors.append([x for x in (end, local.descriptor, memory) if x is not None])
    try:
        children = Children(f"{package}.worker", jobs, descriptors, threads, health)
    finally:
        for end, _ in pipes:
            os.close(end)
    control = PipeSender([end for _, end in pipes], timeout, health)
    ranks = Ranks(0, size, OneRank(), control, device, threads, health, children)
    try:
        meet(local.store, 0, size, fingerprint, timeout=start_timeout, health=health)
        ranks.group = _local_group(local.store, memory, 0, size, device, timeout, health)
    except BaseException:
        ranks.close()
        raise
    finally:
        local.close()
        if memory is not None:
            os.close(memory)
    return ranks


def _local_group(
    store: Store,
    memory: int | None,
    rank: int,
    size: int,
    device: torch.device,
    timeout: float,
    health: Health,
) -> Group:
    """Over shared memory where there is some, which is then held without the descriptor."""
    if memory is None:
        backend = make_backend(store, "data", rank, size, device, timeout, LOOPBACK)
        return TorchGroup(backend, device, timeout, health)
    return SharedMemoryGroup(memory, rank, size, timeout, health)


def join_local(
    fingerprint: Callable[[dict[str, Any]], Mapping[str, str]],
) -> tuple[dict[str, Any], Ranks]:
    """Another rank, in the process that `start_local` has started: rank 0's config, and the ranks."""
    job = read_job()
    rank, size, timeout = job["rank"], job["size"], job["timeout"]
    device, health = torch.device(job["device"]), Health()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = open_store(job["store"], rank, size, timeout)
    prints = fingerprint(job["config"])
    meet(store, rank, size, prints, timeout=job["start_timeout"], health=health)
    group = _local_group(store, job["memory"], rank, size, device, timeout, health)
    if job["memory"] is not None:
        os.close(job["memory"])
    control = PipeReceiver(job["control"], timeout)
    return job["config"], Ranks(rank, size, group, control, device, job["threads"], health)
