"""Replicas, as far as any front door needs to know them: one, and the set that is kept while it serves."""

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

from common.router.config import RouterConfig
from common.router.launching import Launcher, ReplicaDied, cancel
from common.router.link import Link, Status
from common.router.upstream import Upstream, UpstreamFailed

START_SECONDS = 600.0  # for a large model from a slow disk


class Member:
    """One replica: its line, and what is counted of it."""

    def __init__(self, link: Link, config: RouterConfig) -> None:
        self.link, self.index, self.config = link, link.index, config
        # set by the task that looks after it
        self.is_well = self.is_draining = False
        self.well_since = 0.0
        self.starting_since: float | None = None
        self.misses = self.num_deaths = self.num_restarts = 0
        self.status, self.seen = Status(), 0  # `seen`: what was outstanding when it was asked
        self.role = config.roles[self.index] if config.roles else None
        self.num_referred = 0  # requests for which others were sent to it, since it was asked
        # set as requests come and go
        self.outstanding = self.num_requests = self.num_failures = 0
        self.suspected = asyncio.Event()  # a request failed: look at once

    @contextlib.contextmanager
    def counted(self) -> Iterator[Upstream]:
        """A request is with the replica for as long as this lasts."""
        assert self.link.upstream is not None, self.index
        self.outstanding += 1
        self.num_requests += 1
        try:
            yield self.link.upstream
        finally:
            self.outstanding -= 1

    async def look(self, expected_model: str | None) -> None:
        """Ask how it is. Raises ReplicaDied, and UpstreamFailed where it is not well."""
        seen, told = self.outstanding, self.num_referred
        status = await self.link.look()
        if status is None:
            self.is_well = False
            self.limit_start(time.monotonic())
            return
        self.starting_since = None
        if expected_model not in (None, status.model):
            raise UpstreamFailed(f"it serves {status.model[:100]!r}, and not {expected_model!r}")
        if not self.is_well:
            self.is_well, self.well_since = True, time.monotonic()
            self.recover()
            if self.num_restarts and self.link.upstream is not None:
                print(f"Engine {self.index} is ready again: {self.link.upstream.url}", flush=True)
        self.status, self.seen, self.misses = status, seen, 0
        self.num_referred -= told

    def limit_start(self, now: float) -> None:
        """One that takes too long to start is ended. Raises ReplicaDied."""
        if self.starting_since is None:
            self.starting_since = now
            return
        timeout = self.config.start_timeout or START_SECONDS
        if now - self.starting_since >= timeout:
            self.starting_since = None
            self.link.handle.kill()
            raise ReplicaDied(f"engine {self.index} has not started in {timeout:g} s")

    def recover(self) -> None:
        """It is well again: what it did before does not count."""

    async def lose(self) -> None:
        """Out of rotation. What it runs breaks off now, and does not wait for ever."""
        self.is_well, self.status, self.seen = False, Status(), 0
        self.starting_since = None
        await self.link.cut()

    async def wait_or_suspect(self) -> None:
        """Return at the next health check, or when a request has failed."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.suspected.wait(), self.config.health_interval)
        self.suspected.clear()

    async def end(self, grace: float) -> None:
        """End it, when its requests have ended or in `grace` seconds."""
        await self.lose()
        self.link.handle.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.link.handle.ended(), grace)
        self.link.handle.kill()


M = TypeVar("M", bound=Member)


class Members(Generic[M]):
    """All replicas: `least` of them at the start, each looked after by a task of its own."""

    make_member: Callable[[Link, RouterConfig], M]

    def __init__(self, launcher: Launcher, config: RouterConfig, grace: float) -> None:
        """grace: seconds that a replica has to finish what it runs."""
        self.launcher, self.config, self.grace = launcher, config, grace
        self.model: str | None = None  # all serve one, or a client would get now this, now that
        self.on_lost: Callable[[int], None] = lambda index: None  # told an index: a cache is gone
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self.replicas: list[M] = []
        for _ in range(config.least):
            self._launch()

    async def keep(self, replica: M) -> None:
        """Look after one replica, for as long as it is wanted."""
        raise NotImplementedError

    async def scale(self) -> None:
        """Have more or fewer of them, for as long as the router serves."""
        raise NotImplementedError

    async def retire(self, replica: M) -> None:
        """Take one out and end it."""
        raise NotImplementedError

    def _launch(self) -> M:
        index = min({*range(self.config.most)} - {replica.index for replica in self.replicas})
        replica = self.make_member(Link(self.launcher, index, self.config), self.config)
        self.replicas.append(replica)
        return replica

    def add(self) -> None:
        """One more, on the running event loop."""
        self._watch(self._launch())

    def _watch(self, replica: M) -> None:
        self._keepers[replica.index] = asyncio.create_task(self._keep_on(replica))

    async def _keep_on(self, replica: M) -> None:
        """`keep`, after an error that nobody foresaw too: no replica is left without its keeper."""
        while True:
            try:
                await self.keep(replica)
            except Exception:
                print(f"engine {replica.index} is looked after again, after this:", file=sys.stderr)
                traceback.print_exc()
                await asyncio.sleep(self.config.health_interval)

    async def remove(self, replica: M) -> None:
        """One less: it has drained."""
        await cancel(self._keepers.pop(replica.index))
        await replica.end(self.grace)
        self.on_lost(replica.index)
        self.replicas.remove(replica)

    @contextlib.asynccontextmanager
    async def kept(self, app: Any = None) -> AsyncIterator[None]:
        """They are looked after while this lasts. Then they drain and end."""
        for replica in self.replicas:
            self._watch(replica)
        scaling = asyncio.create_task(self.scale())
        try:
            while not any(replica.is_well for replica in self.replicas):
                await asyncio.sleep(0.02)
            yield
        finally:
            await cancel(scaling)
            await asyncio.gather(*map(self.retire, list(self.replicas)))
            self.launcher.close()
