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
from common.router.proxy_config import ProxyConfig
from common.router.request import RoutedRequest
from common.router.run import run

from .config import EngineConfig
from .policies import POLICIES
from .replicas import Replica, ReplicaSet
from .router import Router


class Worker(Replica):
    """A prefill or a decode worker."""

    @property
    def load(self) -> int:
        """A prefill worker's requests come from decode workers; the proxy knows of its own tickets."""
        return super().load + 4 * self.num_referred


class WorkerSet(ReplicaSet):
    make_member = Worker


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
        prefill = [w for w in self.workers.available() if w.status.address is not None]
        if decode and prefill:
            worker = self.prefill.choose(request, prefill)
            worker.num_referred += 1
            request.added[HEADER] = write_ticket(new_ticket(worker.status.address), self.secret)
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
        prefill, secret = POLICIES[config.policy](config), workers.launcher.kv_secret
        self.policy = PrefillAndDecode(prefill, self.policy, workers, secret.encode("latin-1"))
        workers.on_lost = self.policy.forget


def main() -> None:
    run(Proxy, WorkerSet, EngineConfig, __package__, __doc__.partition("\n")[0], ProxyConfig)
