"""Several processes as one engine: how they find each other, talk, and notice that one is gone.

Rank 0 lives in the server's process and decides; the other ranks follow. Rank 0:

    ranks = connect("part09", config, device, size=2, timeout=30.0, fingerprint=fingerprint(config))
    ranks.group.all_reduce(x)  # in the same order on every rank
    ranks.control.send([STEP, num_tokens])  # plain integers, at least one
    if (problem := ranks.problem()) is not None: ...  # noticed even while nothing is computed
    ranks.close()  # ends the ranks that `connect` has started

`connect` starts `python -m part09.worker` for every other rank, or, when torchrun has started this
process (RANK and WORLD_SIZE are set), waits for the ranks that torchrun has started elsewhere. Their
module:

    def serve(config: dict, ranks: Ranks) -> None:
        while numbers := ranks.control.receive():  # [] when rank 0 has closed the group
            ranks.group.all_reduce(forward(numbers))

    if __name__ == "__main__":
        run_worker(serve, fingerprint)  # fingerprint(config) -> dict: must equal rank 0's

Under torchrun every process runs the server's module; `launched_rank()` is above 0 in those that
shall call `run_worker` (config is rank 0's everywhere). All waits raise `RankError`, with one line
for the user; `connect` and `run_worker` turn what happens before all ranks have met into ValueError.
Groups over several engines, each with a rank 0 of its own: `join_engines(ranks, rendezvous, …)`.
"""

from common.distributed.engines import join_engines
from common.distributed.group import Group, OneRank, RankError, even_split
from common.distributed.launch import Ranks, connect, join, join_group, launched_rank, run_worker
from common.distributed.rendezvous import project_fingerprint
from common.models.fingerprint import checkpoint_fingerprint

__all__ = [
    "Group",
    "OneRank",
    "RankError",
    "Ranks",
    "checkpoint_fingerprint",
    "connect",
    "even_split",
    "join",
    "join_engines",
    "join_group",
    "launched_rank",
    "project_fingerprint",
    "run_worker",
]
