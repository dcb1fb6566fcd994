"""One server in front of several engines: `python -m part10.router --data-parallel-size 2`.

Each engine is a server of its own, in a process of its own, and the router speaks HTTP with it. So an
engine that dies takes only what it ran along, and any server that speaks OpenAI's protocol can be one.

A request is tried again elsewhere as long as its client has not seen a token. After the first token
never: the next replica would not go on where the last one broke off, but begin another answer.
"""

from collections.abc import Callable
from functools import partial

from common.http.app import Admission
from common.router.config import RouterConfig
from common.router.exchange import Exchange, ReplicaBusy
from common.router.run import run
from common.router.upstream import UpstreamFailed

from .config import EngineConfig
from .policies import POLICIES
from .replicas import Replica, ReplicaSet

Choose = Callable[[list[Replica]], Replica | None]


class Router:
    """Chooses a replica for each request, and another when that one fails in time."""

    def __init__(self, replicas: ReplicaSet, config: RouterConfig, requests_each: int) -> None:
        """requests_each: requests that there may be for each replica, waiting ones included."""
        self.replicas, self.config, self.requests_each = replicas, config, requests_each
        self.policy = POLICIES[config.policy](config)
        replicas.on_lost = getattr(self.policy, "forget", replicas.on_lost)
        self.admission = Admission(0)
        self.num_retries = self.num_broken_off = 0

    async def complete(self, exchange: Exchange) -> None:
        """A completion, by the policy. Raises ApiError 503 when there is no room for it."""
        self.admission.limit = self.requests_each * len(self.replicas.replicas)
        with self.admission.admit(1):
            await self.forward(partial(self.policy.choose, exchange.request), exchange)

    async def forward(self, choose: Choose, exchange: Exchange) -> None:
        """Let replicas try, each once, until one answers or the client has seen a token."""
        failure: ReplicaBusy | UpstreamFailed | None = None
        tried: set[int] = set()
        while len(tried) <= self.config.max_retries and not exchange.streamed:
            untried = [r for r in self.replicas.available() if r.index not in tried]
            replica = choose(untried) if untried else None
            if replica is None:
                break
            self.num_retries += bool(tried)
            tried.add(replica.index)
            exchange.headers["x-engine"] = str(replica.index)
            try:
                with replica.serving() as upstream:
                    return await exchange.run(upstream, replica.breaker.succeed)
            except ReplicaBusy as busy:  # it is well, but full
                failure = busy
            except UpstreamFailed as failed:
                failure = failed
                replica.fail()
        self.num_broken_off += exchange.streamed
        await exchange.give_up(failure)


if __name__ == "__main__":
    run(Router, ReplicaSet, EngineConfig, __package__, __doc__)
