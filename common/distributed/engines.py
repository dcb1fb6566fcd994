"""Engines that compute together: each has ranks of its own, and all of them are one group as well."""

from collections.abc import Mapping
from pathlib import Path

import torch

from common.distributed.gloo import TorchGroup, make_backend, own_address
from common.distributed.group import Group, OneRank
from common.distributed.launch import START_SECONDS
from common.distributed.local import LOOPBACK
from common.distributed.ranks import LOAD_SECONDS, Ranks
from common.distributed.rendezvous import meet, open_store


def join_engines(
    ranks: Ranks,
    rendezvous: str,
    engine: int,
    num_engines: int,
    *,
    timeout: float,
    fingerprint: Mapping[str, str],
    start_timeout: float = START_SECONDS,
) -> tuple[Group, Group]:
    """(all engines' ranks, where they are stages those of this rank's; the engines' first ranks), for
    each rank of each engine to call.

    rendezvous: the path of a new file, for engines of one host, which is removed when all have met; or
    host:port, where rank 0 of engine 0 listens. Each engine has equally many ranks, and its ranks
    follow one another in the large group. That is on the ranks' device, the other on the CPU; a rank
    that is not its engine's first is alone in the other. Both end with `ranks`. Raises ValueError
    when a rank does not come within `start_timeout` seconds or is not like the first.
    """
    if num_engines == 1:
        return ranks.group, OneRank()
    rank, size = engine * ranks.size + ranks.rank, num_engines * ranks.size
    host = LOOPBACK if "/" in rendezvous else own_address(rendezvous.rpartition(":")[0])
    health, ranks.timeout = ranks.health, timeout
    store = open_store(rendezvous, rank, size, start_timeout)
    meet(store, rank, size, fingerprint, timeout=start_timeout, health=health)

    def connect(name: str, place: int, number: int, device: torch.device) -> Group:
        patience = max(timeout, LOAD_SECONDS)
        backend = make_backend(store, name, place, number, device, patience, host)
        group = TorchGroup(backend, device, patience, health)
        ranks.further_groups.append(group)
        return group

    stage, width = 0, ranks.size
    if ranks.stages is not None and ranks.stages.size > 1:
        stage, width = ranks.stages.number, ranks.stages.group.size
    numbers = engine * width + ranks.rank % width, num_engines * width
    everyone = connect(f"experts {stage}", *numbers, ranks.device)
    leaders: Group = OneRank()
    if ranks.rank == 0:
        leaders = connect("leaders", engine, num_engines, torch.device("cpu"))
    ranks.group.minimum(everyone.minimum(0))  # all are connected, and need the store no more
    if rank == 0 and "/" in rendezvous:
        Path(rendezvous).unlink(missing_ok=True)
    return everyone, leaders
