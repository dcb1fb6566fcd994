"""How a router starts: its replicas first, then its server."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI

from common.http.run import ServerConfig, serve
from common.options import parse
from common.router.config import RouterConfig
from common.router.launchers import make_launcher, requests_each
from common.router.launching import ReplicaDied
from common.router.serving import create_app
from common.router.upstream import UpstreamFailed


def run(
    router: Any,
    replicas: Any,
    engine: Any,
    package: str,
    description: str,
    settings: type[RouterConfig] = RouterConfig,
) -> None:
    """Serve until SIGTERM or Ctrl+C, as the command line says.

    router, replicas, engine: the classes of a part's Router, ReplicaSet and EngineConfig. settings:
    the router's own. A replica that does not start ends all with one line and status 1.
    """
    configs = parse([settings, engine, ServerConfig], description=description)
    config, engine, server = configs

    def build() -> FastAPI:
        launcher = make_launcher(f"{package}.replicas", engine, config, server)
        try:
            members = replicas(launcher, config, server.shutdown_timeout)
            asyncio.run(wait_until_well(members, server.served_model_name))
        except BaseException:  # SIGTERM too
            launcher.kill()
            raise
        return create_app(router(members, config, requests_each(engine, server)), server)

    serve(build, server)


async def wait_until_well(replicas: Any, model: str | None) -> None:
    """All must be, at the start. model: what they must serve; None: the same. Raises ValueError."""
    begin = time.monotonic()
    for replica in replicas.replicas:
        try:
            while not replica.is_well:
                await asyncio.sleep(0.02)
                await replica.look(model)
        except (ReplicaDied, UpstreamFailed) as error:
            raise ValueError(f"engine {replica.index}: {error}") from None
        else:
            seconds, url = time.monotonic() - begin, replica.link.upstream.url
            print(f"Engine {replica.index} is ready after {seconds:.1f} s: {url}", flush=True)
            model = replica.status.model
        finally:
            await replica.lose()  # its connections belong to this event loop
    replicas.model = model
