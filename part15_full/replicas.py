"""The engines behind the router: whether each is well, how much it has to do, and how many there are.

    starting --answers /health--> well --does not answer, or has ended--> lost --answers--> well
                                   |                                        |
                                   '--too many at low load--> draining      '--ours: restarted, later
                                                                               each time

`python -m part10.replicas` is one of them: a server on loopback that only the router has the key to,
told what to run on its standard input, and ended with it.
"""

import asyncio
import contextlib
import enum
import sys
import time
from collections.abc import Callable, Iterator

from common.router.child import serve_job
from common.router.config import RouterConfig
from common.router.launching import ReplicaDied
from common.router.link import Link
from common.router.members import Member, Members
from common.router.upstream import Upstream, UpstreamFailed

MAX_MISSES = 3  # of health checks in a row
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 30.0  # before a replica is started again
STEADY_SECONDS = 60.0  # of health after which earlier deaths are forgotten


class BreakerState(enum.IntEnum):
    CLOSED, HALF_OPEN, OPEN = range(3)


class Breaker:
    """Keeps requests from a replica that is well by its own account, and fails them.

    Failures in a row open it. After some seconds one request is let through: it closes the breaker,
    or opens it again. An answer that blames the request (4xx) is a success: the replica works.
    """

    def __init__(
        self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.failures, self.seconds, self.clock = failures, seconds, clock
        self.in_a_row = 0
        self.opened: float | None = None
        self.on_trial = False

    @property
    def state(self) -> BreakerState:
        if self.opened is None:
            return BreakerState.CLOSED
        is_over = self.clock() >= self.opened + self.seconds
        return BreakerState.HALF_OPEN if is_over else BreakerState.OPEN

    @property
    def lets_through(self) -> bool:
        return not self.on_trial and self.state is not BreakerState.OPEN

    def begin(self) -> None:
        self.on_trial = self.state is BreakerState.HALF_OPEN

    def succeed(self) -> None:
        self.in_a_row, self.opened, self.on_trial = 0, None, False

    def fail(self) -> None:
        self.in_a_row += 1
        if self.in_a_row >= self.failures:
            self.opened = self.clock()
        self.on_trial = False


class Replica(Member):
    """One engine behind the router."""

    def __init__(self, link: Link, config: RouterConfig) -> None:
        super().__init__(link, config)
        self.breaker = Breaker(config.breaker_failures, config.breaker_seconds)

    @property
    def is_available(self) -> bool:
        return self.is_well and not self.is_draining and self.breaker.lets_through

    @property
    def load(self) -> int:
        """4 * waiting + running, as the replica said last. What the router has sent since waits, and
        where some have ended, others wait no longer."""
        waiting = self.status.waiting + self.outstanding - self.seen
        running = self.status.running + min(0, waiting)
        return 4 * max(0, waiting) + max(0, running)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Upstream]:
        """A request is with the replica for as long as this lasts. Nobody is to blame when its
        client goes away."""
        self.breaker.begin()
        try:
            with self.counted() as upstream:
                yield upstream
        finally:
            self.breaker.on_trial = False

    def recover(self) -> None:
        self.breaker.succeed()

    def fail(self) -> None:
        """A request has failed there."""
        self.num_failures += 1
        self.breaker.fail()
        self.suspected.set()


class ReplicaSet(Members[Replica]):
    """All replicas, each looked after by a task of its own: `least` of them, or more by load."""

    make_member = Replica

    def available(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_available]

    async def keep(self, replica: Replica) -> None:
        """Look at a replica again and again. One of ours that ends, or hangs, is started anew."""
        while True:
            try:
                await replica.look(self.model)
            except ReplicaDied as death:
                await self.restart(replica, str(death))
            except UpstreamFailed:
                replica.misses += 1
                if replica.misses >= MAX_MISSES:
                    await replica.lose()
                    replica.link.handle.kill()
            await replica.wait_or_suspect()

    async def restart(self, replica: Replica, reason: str) -> None:
        """Later each time, unless it was well for long."""
        await replica.lose()
        self.on_lost(replica.index)
        if time.monotonic() - replica.well_since > STEADY_SECONDS:
            replica.num_deaths = 0
        seconds = min(BACKOFF_SECONDS * 2**replica.num_deaths, MAX_BACKOFF_SECONDS)
        print(f"{reason}; it starts again in {seconds:g} s", file=sys.stderr, flush=True)
        await asyncio.sleep(seconds)
        replica.num_deaths, replica.num_restarts = replica.num_deaths + 1, replica.num_restarts + 1
        replica.link.launch()

    async def scale(self) -> None:
        """One more when there was too much to do for some seconds; one less after too little."""
        config = self.config
        much_since = little_since = time.monotonic()
        while config.most > config.least:
            await asyncio.sleep(config.health_interval)
            now, count = time.monotonic(), len(self.replicas)
            pending = sum(replica.outstanding for replica in self.replicas) / count
            much_since = much_since if pending > config.scale_up_pending else now
            little_since = little_since if pending < config.scale_down_pending else now
            if not all(replica.is_well for replica in self.replicas):
                continue  # what the one that starts will bring is not known yet
            if count < config.most and now - much_since >= config.scale_up_seconds:
                self.add()
            elif count > config.least and now - little_since >= config.scale_down_seconds:
                await self.retire(self.replicas[-1])

    async def retire(self, replica: Replica) -> None:
        """Drain: no new request; those that run come to their ends, and then the replica to its."""
        replica.is_draining = True
        deadline = time.monotonic() + self.grace
        while replica.outstanding and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self.remove(replica)


if __name__ == "__main__":  # the router needs no engine of its own
    from .config import EngineConfig
    from .server import connect_engine, create_app

    serve_job(lambda engine, server: create_app(connect_engine(EngineConfig(**engine)), server))
