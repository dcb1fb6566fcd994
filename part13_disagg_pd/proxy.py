"""One front door to prefill and decode workers: `python -m part13.server --role proxy`.

    client --> proxy --request, ticket--> decode worker --prompt--> prefill worker
      ^          |                             ^                           |
      '--tokens--'<-----------tokens-----------'<----keys and values-------'

A request goes to a decode worker, and to it alone. With it goes a ticket: the address of a prefill
worker that may compute the prompt. The decode worker knows how long the prompt is in tokens and what of
it lies in its cache, so it decides whether that pays. Where the prefill worker fails it computes the
prompt itself, and the client sees nothing of it. So the proxy has one kind of failure to deal with,
which is the router's: the server that was to answer is gone.
"""

from collections.abc import Sequence
from typing import Any

from common.kv_transfer.ticket import HEADER, new_ticket, write_ticket
from common.router.config import RouterConfig
from common.router.launching import Launcher
from common.router.link import Link
from common.router.proxy_config import ProxyConfig, kv_transfer_of
from common.router.request import RoutedRequest
from common.router.run import run
from common.router.upstream import UpstreamFailed

from .config import EngineConfig
from .policies import POLICIES
from .replicas import Replica, ReplicaSet
from .router import Router


class Worker(Replica):
    """A prefill or a decode worker."""

    def __init__(self, link: Link, config: RouterConfig) -> None:
        super().__init__(link, config)
        self.role = config.roles[self.index]
        self.address: str | None = None  # from which a prefill worker's blocks are fetched
        self.num_tickets = 0  # that name it, since it was last asked how it is

    @property
    def load(self) -> int:
        """A prefill worker's requests come from decode workers: the proxy knows of its tickets."""
        return super().load + 4 * self.num_tickets

    async def look(self, expected_model: str | None) -> None:
        told = self.num_tickets
        await super().look(expected_model)
        self.num_tickets -= told
        if self.is_well:
            role, self.address = await kv_transfer_of(self.link.upstream, self.config)
            if role != self.role:
                self.is_well = False
                raise UpstreamFailed(f"its role is {role[:20]!r}, and not {self.role!r}")


class WorkerSet(ReplicaSet):
    make_member = Worker

    def prefill_workers(self) -> list[Worker]:
        return [w for w in self.available() if w.role == "prefill" and w.address is not None]


class PrefillAndDecode:
    """A policy for each kind of worker: each kind has caches of its own."""

    def __init__(self, prefill: Any, decode: Any, workers: WorkerSet, secret: bytes) -> None:
        self.prefill, self.decode = prefill, decode
        self.workers, self.secret = workers, secret

    def choose(self, request: RoutedRequest, replicas: Sequence[Worker]) -> Worker:
        """A decode worker; its ticket is in `request.added`. With no decode worker left a prefill
        worker does all."""
        decode = [w for w in replicas if w.role == "decode"]
        chosen = self.decode.choose(request, decode or replicas)
        request.added.pop(HEADER, None)
        if decode and (workers := self.workers.prefill_workers()):
            worker = self.prefill.choose(request, workers)
            worker.num_tickets += 1
            request.added[HEADER] = write_ticket(new_ticket(worker.address), self.secret)
        return chosen

    def forget(self, index: int) -> None:
        """A worker has ended, and its cache with it."""
        for policy in (self.prefill, self.decode):
            getattr(policy, "forget", lambda index: None)(index)

    def __getattr__(self, name: str) -> Any:
        """What else is asked of a policy are counts: those of the workers that answer."""
        return getattr(self.decode, name)


class Proxy(Router):
    """A router whose engines are of two kinds."""

    def __init__(self, workers: WorkerSet, config: ProxyConfig, requests_each: int) -> None:
        super().__init__(workers, config, requests_each)
        launcher: Launcher = workers.launcher
        secret = launcher.kv_secret.encode("latin-1")
        decode = self.policy
        self.policy = PrefillAndDecode(POLICIES[config.policy](config), decode, workers, secret)
        workers.on_lost = self.policy.forget


def main() -> None:
    run(Proxy, WorkerSet, EngineConfig, __package__, __doc__, ProxyConfig)
