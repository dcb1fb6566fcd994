"""Replicas as Ray's actors: on the machines of a Ray cluster, or on this one.

An actor runs the same command as the local launcher, on a machine where its placement group has
reserved what it needs, and does nothing else. Ray starts it again when it dies, and it dies when its
replica does. Ray pickles what an actor is called with; so this is the one place where something is
unpickled from a socket, and a Ray that is started here listens on loopback only.
"""

import asyncio
import contextlib
import os
import signal
import threading
from typing import Any

from common.router.config import RouterConfig
from common.router.launching import ChildServer, ReplicaDied
from common.router.resources import num_gpus

ASK_SECONDS = 1.0  # for an actor to answer; one that is being started again does not
GRACE_SECONDS = 2.0  # for an actor to end its replica


def start_ray(address: str | None, num_cpus: int) -> Any:
    """Ray, joined at an address or started here with so many cores. Raises ValueError."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # What Ray does on a laptop: every one of its servers on loopback. Else they listen on all
        # interfaces, whatever address is given.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError:
        raise ValueError("launcher is ray, and ray is not installed: pip install ray") from None
    handler = signal.getsignal(signal.SIGTERM)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            local = {"_node_ip_address": "127.0.0.1", "num_cpus": num_cpus}
            ray.init(address="local", **local, **quiet)
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray_address is {address}: {str(error).splitlines()[0]}") from None
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which aborts
    return ray


class ReplicaActor:
    """In Ray's process: one replica, for as long as it lives."""

    def __init__(self, module: str, job: dict[str, Any], name: str) -> None:
        import ray

        server = job["server"] | {"host": ray.util.get_node_ip_address()}
        self.is_stopping = False
        self.child = ChildServer(module, job | {"server": server}, name, {})
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """A replica that has ended by itself takes the actor along. One that never began would do so
        again and again: the router is told instead."""
        self.child.process.wait()
        if self.child.address is not None and not self.is_stopping:
            os._exit(1)

    def look(self) -> tuple[str | None, str | None]:
        """(where the replica listens, how it has ended)."""
        return self.child.address, self.child.problem()

    def pids(self) -> tuple[int, int]:
        """Of this process and its replica."""
        return os.getpid(), self.child.process.pid

    def stop(self) -> None:
        self.is_stopping = True
        self.child.stop()

    def kill(self) -> None:
        self.is_stopping = True
        self.child.kill()


class RayHandle:
    """One actor, and the resources that are reserved for it."""

    def __init__(self, ray: Any, actor: Any, group: Any) -> None:
        self.ray, self.actor, self.group = ray, actor, group
        self._asked: Any = None

    async def url(self) -> str | None:
        address, problem = await self._look()
        if problem is not None:
            raise ReplicaDied(problem)
        return address

    async def _look(self) -> tuple[str | None, str | None]:
        if self._asked is None:
            self._asked = asyncio.wrap_future(self.actor.look.remote().future())
        try:
            answer = await asyncio.wait_for(asyncio.shield(self._asked), ASK_SECONDS)
        except TimeoutError:
            return None, None  # it starts: the question stands
        except self.ray.exceptions.ActorUnavailableError:
            answer = None, None  # Ray starts it again
        except self.ray.exceptions.RayError as error:
            answer = None, f"its actor is gone: {type(error).__name__}"
        self._asked = None
        return answer

    def stop(self) -> None:
        self.actor.stop.remote()

    async def ended(self) -> None:
        while (await self._look())[1] is None:
            await asyncio.sleep(0.1)

    def kill(self) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.get(self.actor.kill.remote(), timeout=GRACE_SECONDS)
        with contextlib.suppress(self.ray.exceptions.RayError, ValueError):
            self.ray.kill(self.actor)
            self.ray.util.remove_placement_group(self.group)


class RayLauncher:
    """Replicas as actors."""

    def __init__(self, module: str, job: dict[str, Any], engine: Any, config: RouterConfig) -> None:
        """Raises ValueError."""
        self.module, self.job = module, job
        self.api_key: str | None = job["server"]["api_key"]
        cpus, gpus = job["engine"]["threads"] or 1, num_gpus(engine)
        self.needs = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self.ray = start_ray(config.ray_address, cpus * config.most)
        self.handles: dict[int, RayHandle] = {}
        there = self.ray.cluster_resources()
        if config.ray_address is None and there.get("GPU", 0) < gpus * config.most:
            self.close()
            raise ValueError(
                f"data_parallel_size is {config.most}: {gpus * config.most} GPUs are needed, and"
                f" Ray has {there.get('GPU', 0):g}"
            )

    def launch(self, index: int) -> RayHandle:
        if index in self.handles:
            self.handles[index].kill()
        group = self.ray.util.placement_group([self.needs], strategy="STRICT_PACK")
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
        actor_class = self.ray.remote(ReplicaActor).options(
            num_cpus=self.needs["CPU"],
            num_gpus=self.needs.get("GPU", 0),
            scheduling_strategy=strategy,
            max_restarts=-1,  # for ever
            max_concurrency=4,
        )
        actor = actor_class.remote(self.module, self.job, f"engine {index}")
        self.handles[index] = RayHandle(self.ray, actor, group)
        return self.handles[index]

    def close(self) -> None:
        self.ray.shutdown()

    def kill(self) -> None:
        for handle in self.handles.values():
            handle.kill()
        self.close()
