"""Part 10: replicas as actors of a real Ray, started here, on loopback."""

import asyncio
import contextlib
import importlib.util
import os
import re
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest

from common.testing.router import children, engine_process, health, router, until
from common.testing.server import RunningServer
from common.testing.streams import Streamed, stream_many, streaming_engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)

FLAGS = (
    "--launcher", "ray", "--min-replicas", "2", "--max-replicas", "3", "--health-interval", "0.2",
    "--scale-up-pending", "6", "--scale-up-seconds", "0.5", "--scale-down-seconds", "0.5",
    "--threads", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningServer]:
    with router(*FLAGS) as server:
        yield server


def running(server: RunningServer, word: str) -> list[psutil.Process]:
    """Ray's processes, and those of replicas, that have a word in their command line."""
    found = []
    for process in children(server):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if any(word in part for part in process.cmdline()):
                found.append(process)
    return found


def test_everything_listens_on_loopback_and_tells_nobody(cluster: RunningServer):
    assert len(re.findall(r"Engine \d is ready .* http://127\.0\.0\.1:", cluster.output)) == 2
    processes = [psutil.Process(cluster.process.pid), *children(cluster)]
    assert any("raylet" in "".join(process.cmdline()) for process in processes)
    for process in processes:
        for connection in process.net_connections("inet"):
            address = connection.laddr.ip.removeprefix("::ffff:")
            assert address in ("127.0.0.1", "::1"), (process.cmdline(), connection)
            if connection.raddr:
                assert connection.raddr.ip.removeprefix("::ffff:") in ("127.0.0.1", "::1")
    assert os.environ.get("RAY_USAGE_STATS_ENABLED") is None  # the router says it for itself
    assert {p.environ()["RAY_USAGE_STATS_ENABLED"] for p in running(cluster, "raylet")} == {"0"}


def test_an_actor_that_is_killed_fails_nothing_that_had_no_token(cluster: RunningServer):
    until(lambda: health(cluster)["available"] == 2)
    replicas = {str(engine): engine_process(cluster, engine) for engine in range(2)}
    actors = {replica: replica.parent() for replica in replicas.values()}
    assert all("ReplicaActor" in " ".join(actor.cmdline()) for actor in actors.values())

    async def load() -> list[Streamed]:
        bodies = [{"prompt": str(n), "metadata": {"interval": "0.03"}} for n in range(40)]
        begun: list[Streamed] = []
        streams = asyncio.ensure_future(stream_many(cluster.base_url, bodies, 10, begun))
        replica = replicas[await streaming_engine(begun)]
        actors[replica].send_signal(signal.SIGKILL)
        replica.send_signal(signal.SIGKILL)
        return await streams

    streams = asyncio.run(load())
    broken = [stream for stream in streams if not stream.is_done]
    assert broken
    for stream in broken:
        assert stream.ending == "error" and stream.num_chunks > 0, stream
    until(lambda: health(cluster)["available"] == 2)  # Ray has started it again
    again = asyncio.run(stream_many(cluster.base_url, [{"prompt": str(n)} for n in range(10)]))
    assert {(s.ending, s.engine) for s in again} == {("done", "0"), ("done", "1")}


def test_actors_come_with_the_load_and_go_after_it(cluster: RunningServer):
    async def grow() -> list[Streamed]:
        busy = [{"prompt": "x", "metadata": {"tokens": "60", "interval": "0.5"}}] * 20
        load = asyncio.ensure_future(stream_many(cluster.base_url, busy))
        await asyncio.to_thread(until, lambda: health(cluster)["available"] == 3)
        assert not load.done()
        load.cancel()
        return await stream_many(cluster.base_url, [{"prompt": str(n)} for n in range(9)])

    streams = asyncio.run(grow())
    assert {s.ending for s in streams} == {"done"} and "2" in {s.engine for s in streams}
    until(lambda: health(cluster)["engines"] == 2)
    until(lambda: len(running(cluster, "stand_ins.replicas")) == 2)
    assert httpx.post(f"{cluster.base_url}/v1/completions", json={"prompt": "x"}).status_code == 200


def test_at_the_end_nothing_is_left(cluster: RunningServer):
    processes = children(cluster)
    assert cluster.stop() == 0, cluster.output
    until(lambda: not any(process.is_running() for process in processes), 20)
