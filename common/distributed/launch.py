"""How an engine gets its ranks: started here, or found where torchrun has started them."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from common.device import usable_cores
from common.distributed.control import NoControl
from common.distributed.gloo import TorchGroup, make_backend, own_address
from common.distributed.group import Group, OneRank, RankError
from common.distributed.health import Health
from common.distributed.local import LOOPBACK, join_local, start_local
from common.distributed.ranks import Ranks
from common.distributed.rendezvous import meet, open_store
from common.distributed.stages import Stages
from common.distributed.torchrun import by_torchrun, join_torchrun, start_torchrun

START_SECONDS = 120.0  # for every rank to come: it imports PyTorch, on a machine that may be busy


def launched_rank() -> int:
    """This process' rank if torchrun has started it, else 0."""
    return int(os.environ["RANK"]) if by_torchrun() else 0


def connect(
    package: str,
    config: Mapping[str, Any],
    device: torch.device,
    *,
    size: int,
    timeout: float,
    fingerprint: Mapping[str, str],
    start_timeout: float = START_SECONDS,
    use_shared_memory: bool = True,
    num_stages: int = 1,
) -> Ranks:
    """Rank 0: start the other ranks, or find those that torchrun has started, and meet them.

    config is plain JSON, and reaches every rank. A GPU's number is rank 0's; the others take the
    next ones. timeout: seconds that any wait may take later on. num_stages: that divide the ranks. CPU ranks of one host share memory,
    or take gloo where they shall or can not. Raises ValueError, one line, when
    a rank fails to start, does not come, or is not like rank 0.
    """
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    if size == 1:
        ranks = Ranks(0, 1, OneRank(), NoControl(), device, usable_cores())
        ranks.divide(Stages(0, 1, ranks.group))
        return ranks
    try:
        if by_torchrun():
            where = config, device, size, timeout, fingerprint, start_timeout
            return start_torchrun(*where, num_stages)
        return start_local(
            package,
            config,
            device,
            size=size,
            timeout=timeout,
            fingerprint=fingerprint,
            start_timeout=start_timeout,
            use_shared_memory=use_shared_memory,
            num_stages=num_stages,
        )
    except (RankError, OSError) as error:
        raise ValueError(str(error)) from None


def join(
    fingerprint: Callable[[dict[str, Any]], Mapping[str, str]],
) -> tuple[dict[str, Any], Ranks]:
    """Another rank: rank 0's config, and the ranks. fingerprint: of a config, as this rank sees it.

    Raises ValueError as `connect` does.
    """
    try:
        if by_torchrun():
            return join_torchrun(fingerprint, START_SECONDS)
        return join_local(fingerprint)
    except (RankError, OSError) as error:
        raise ValueError(str(error)) from None


def run_worker(
    serve: Callable[[dict[str, Any], Ranks], None],
    fingerprint: Callable[[dict[str, Any]], Mapping[str, str]],
) -> NoReturn:
    """The whole life of another rank: join, serve, end. What goes wrong is one line on standard
    error, which reaches rank 0, and status 1. Call it in the main thread."""
    status = 0
    try:
        config, ranks = join(fingerprint)
        # Also sent by torchrun, by systemd and by a terminal to all processes at once. Rank 0 answers
        # its clients first; the others end after it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        serve(config, ranks)
    except (ValueError, RankError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: threads of gloo or NCCL may wait for ranks that are gone


def join_group(
    rendezvous: str, rank: int, size: int, device: torch.device, timeout: float
) -> Group:
    """A group of ranks that others have started, such as all ranks of several engines.

    rendezvous: the path of a file that no earlier group has used (ranks of one host, who meet over
    loopback), or host:port, where rank 0 listens (its host must be this name's). Raises ValueError
    when a rank does not come within `timeout` seconds.
    """
    if size == 1:
        return OneRank()
    health = Health()
    store = open_store(rendezvous, rank, size, timeout)
    meet(store, rank, size, {"size": str(size)}, timeout=timeout, health=health)
    host = LOOPBACK if "/" in rendezvous else own_address(rendezvous.rpartition(":")[0])
    backend = make_backend(store, "group", rank, size, device, timeout, host)
    return TorchGroup(backend, device, timeout, health)
