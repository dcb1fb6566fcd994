"""The ranks of an engine that torchrun has started, perhaps on several hosts.

They meet in torchrun's store, at MASTER_ADDR:MASTER_PORT, and hear rank 0 through gloo. gloo listens
on the address that leads to MASTER_ADDR, or on the interface that GLOO_SOCKET_IFNAME names.
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from common.device import usable_cores
from common.distributed.control_gloo import GlooReceiver, GlooSender
from common.distributed.gloo import TorchGroup, make_backend, own_address
from common.distributed.group import Group
from common.distributed.health import Health, reason_of
from common.distributed.ranks import LOAD_SECONDS, Ranks
from common.distributed.rendezvous import meet
from common.distributed.stages import join_stages

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOB = "job"  # key in the store: what rank 0 tells the others at the start, as JSON


def by_torchrun() -> bool:
    """Whether torchrun has started this process as one of its ranks."""
    return all(name in os.environ for name in VARIABLES)


def start_torchrun(
    config: Mapping[str, Any],
    device: torch.device,
    size: int,
    timeout: float,
    fingerprint: Mapping[str, str],
    start_timeout: float,
    num_stages: int = 1,
) -> Ranks:
    """Rank 0. Raises ValueError, RankError."""
    rank, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if found != size:
        raise ValueError(
            f"torchrun has started {found} ranks (WORLD_SIZE), but {size} are asked for"
        )
    assert rank == 0, f"rank {rank} is to call run_worker"
    store = _torchrun_store(start_timeout)
    job = {
        "config": config,
        "device": device.type,
        "timeout": timeout,
        "start_timeout": start_timeout,
        "num_stages": num_stages,
    }
    store.set(JOB, json.dumps(job))
    return _meet_all(store, 0, job, fingerprint)


def join_torchrun(
    fingerprint: Callable[[dict[str, Any]], Mapping[str, str]], start_timeout: float
) -> tuple[dict[str, Any], Ranks]:
    """Another rank: rank 0's config, and the ranks. Raises ValueError."""
    store = _torchrun_store(start_timeout)
    try:
        job = json.loads(store.get(JOB))
    except RuntimeError:
        raise ValueError(f"rank 0 has not come within {start_timeout:g} s") from None
    prints = fingerprint(job["config"])
    return job["config"], _meet_all(store, int(os.environ["RANK"]), job, prints)


def _meet_all(store: Store, rank: int, job: dict, fingerprint: Mapping[str, str]) -> Ranks:
    size, timeout = int(os.environ["WORLD_SIZE"]), job["timeout"]
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device, health = torch.device(job["device"]), Health()
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            num_gpus = torch.cuda.device_count()
            raise ValueError(f"rank {rank} needs cuda:{local_rank}, but torch sees {num_gpus} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    meet(store, rank, size, fingerprint, timeout=job["start_timeout"], health=health)
    host = own_address(os.environ["MASTER_ADDR"])
    patience = max(timeout, LOAD_SECONDS)
    # An order is taken when its rank has time; heartbeats count.
    orders = make_backend(store, "control", rank, size, torch.device("cpu"), patience, host)

    def make(name: str, of: list[int]) -> Group:
        backend = make_backend(store, name, of.index(rank), len(of), device, patience, host)
        return TorchGroup(backend, device, patience, health, of)

    group = make("data", list(range(size)))
    sides = GlooSender if rank == 0 else GlooReceiver
    threads = max(1, usable_cores() // num_local)
    control = sides(orders, store, timeout, health)
    control.expect_signs()
    ranks = Ranks(rank, size, group, control, device, threads, health, timeout=timeout)
    ranks.divide(join_stages(job["num_stages"], rank, group, make))
    return ranks


def _torchrun_store(timeout: float) -> Store:
    """torchrun's own store where it serves one, else one that rank 0 serves. Raises ValueError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout)
    try:
        store = TCPStore(host, port, None, serves, limit, wait_for_workers=False)
    except RuntimeError as error:
        reason = reason_of(error)
        raise ValueError(f"no rendezvous at {host}:{port} (MASTER_ADDR): {reason}") from None
    run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"ranks/{run}", store)
