"""The ranks of an engine on one host: rank 0 starts the others as its children.

They meet in a store that is a file in a private folder, removed as soon as they have met, and hear
rank 0 through sockets without a name. CPU ranks share memory: then no port is open. (NCCL and gloo listen.)
"""

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch.distributed import Store

from common.device import usable_cores
from common.distributed import shared_memory
from common.distributed.children import Children, read_job
from common.distributed.control import SocketReceiver, SocketSender
from common.distributed.gloo import TorchGroup, make_backend
from common.distributed.group import Group, OneRank
from common.distributed.health import Health
from common.distributed.ranks import LOAD_SECONDS, Ranks
from common.distributed.rendezvous import LocalStore, meet, open_store
from common.distributed.stages import join_stages, members_of

LOOPBACK = "127.0.0.1"


def start_local(
    package: str,
    config: Mapping[str, Any],
    device: torch.device,
    *,
    size: int,
    timeout: float,
    fingerprint: Mapping[str, str],
    start_timeout: float,
    use_shared_memory: bool,
    num_stages: int = 1,
) -> Ranks:
    """Rank 0. Raises ValueError, RankError, OSError."""
    first = device.index or 0
    if device.type == "cuda" and first + size > torch.cuda.device_count():
        num_gpus = torch.cuda.device_count()
        raise ValueError(f"{size} ranks from {device} on, but torch sees {num_gpus} GPUs")
    health, threads = Health(), max(1, usable_cores() // size)
    with contextlib.ExitStack() as held:  # what only the start needs
        local = LocalStore(size)
        held.callback(local.close)
        memory = None
        if use_shared_memory and shared_memory.is_available() and device.type == "cpu":
            memory = shared_memory.make_memory(
                size, *map(len, members_of(num_stages, size).values())
            )
            held.callback(os.close, memory)
        pairs = [socket.socketpair() for _ in range(1, size)]
        for _, theirs in pairs:
            held.callback(theirs.close)
        job = {
            "config": config,
            "size": size,
            "num_stages": num_stages,
            "threads": threads,
            "timeout": timeout,
            "start_timeout": start_timeout,
            "parent": os.getpid(),
            "store": local.path,
            "memory": memory,
        }
        jobs, inherited = [], []
        for rank, (_, theirs) in enumerate(pairs, 1):
            own = "cpu" if device.type == "cpu" else f"cuda:{first + rank}"
            jobs.append({**job, "rank": rank, "device": own, "control": theirs.fileno()})
            descriptors = (theirs.fileno(), memory)
            inherited.append([x for x in descriptors if x is not None])
        children = Children(f"{package}.worker", jobs, inherited, threads, health)
        control = SocketSender([ours for ours, _ in pairs], timeout, health)
        ranks = Ranks(0, size, OneRank(), control, device, threads, health, children, timeout)
        try:
            if memory is not None:
                shared_memory.load_kernels()
            meet(local.store, 0, size, fingerprint, timeout=start_timeout, health=health)
            patience = max(timeout, LOAD_SECONDS)
            _join_groups(ranks, local.store, memory, num_stages, patience)
            control.expect_signs()
        except BaseException:
            ranks.close()
            raise
    return ranks


def _join_groups(
    ranks: Ranks, store: Store, memory: int | None, num_stages: int, timeout: float
) -> None:
    """Of all ranks, and of stages; over shared memory where there is some. Once they are here, no rank
    needs the store."""
    size, device, health = ranks.size, ranks.device, ranks.health
    members = {"data": list(range(size))} | members_of(num_stages, size)
    sizes = [shared_memory.memory_bytes(len(ranks)) for ranks in members.values()]
    offsets = dict(zip(members, accumulate(sizes, initial=0), strict=False))

    def make(name: str, of: list[int]) -> Group:
        place, number = of.index(ranks.rank), len(of)
        if memory is None:
            backend = make_backend(store, name, place, number, device, timeout, LOOPBACK)
            return TorchGroup(backend, device, timeout, health, of)
        numbers = place, number, timeout, health, offsets[name], of, size
        return shared_memory.SharedMemoryGroup(memory, *numbers)

    ranks.group = make("data", members["data"])
    ranks.divide(join_stages(num_stages, ranks.rank, ranks.group, make))
    ranks.group.minimum(0)  # every rank has read what it needs: the store's file may go


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
    if job["memory"] is not None:
        shared_memory.load_kernels()
    meet(store, rank, size, prints, timeout=job["start_timeout"], health=health)
    control = SocketReceiver(socket.socket(fileno=job["control"]), timeout)
    threads = job["threads"]
    ranks = Ranks(rank, size, OneRank(), control, device, threads, health, timeout=timeout)
    _join_groups(ranks, store, job["memory"], job["num_stages"], max(timeout, LOAD_SECONDS))
    if job["memory"] is not None:
        os.close(job["memory"])
    return job["config"], ranks
