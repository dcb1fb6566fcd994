"""The router's line to one replica: where it is, what it says about itself, and how to cut it off."""

import json
from dataclasses import dataclass

from common.router.config import RouterConfig
from common.router.exposition import total
from common.router.launching import Handle, Launcher
from common.router.upstream import Upstream, UpstreamFailed


@dataclass(frozen=True)
class Status:
    """What a replica that is well says: its model, and what it has to do (zeros where unknown).

    address: from which other workers fetch the keys and values that it computes, if they do.
    """

    model: str = ""
    waiting: int = 0
    running: int = 0
    address: str | None = None


class Link:
    """To a replica of this launcher's; `upstream` is None while it starts, and after a cut."""

    def __init__(self, launcher: Launcher, index: int, config: RouterConfig) -> None:
        self.launcher, self.index, self.config = launcher, index, config
        self.handle: Handle = launcher.launch(index)
        self.upstream: Upstream | None = None

    def launch(self) -> None:
        """Start it again."""
        self.handle = self.launcher.launch(self.index)

    async def look(self) -> Status | None:
        """How the replica is; None while it starts. Raises ReplicaDied, and UpstreamFailed where it
        is not well."""
        url = await self.handle.url()
        if url is None or (self.upstream is not None and self.upstream.url != url):
            await self.cut()
        if url is None:
            return None
        if self.upstream is None:
            self.upstream = Upstream(url, self.launcher.api_key, self.config.response_timeout)
        upstream, timeout = self.upstream, self.config.health_timeout
        await ask(upstream, "/health", timeout)
        model = await model_of(upstream, timeout)
        status, body = await upstream.get("/metrics", timeout)
        text = body.decode(errors="replace") if status == 200 else ""
        waiting, running = (
            int(total(text, f"vllm:num_requests_{name}") or 0) for name in ("waiting", "running")
        )
        address = None
        if self.config.roles:
            address = await address_of(upstream, self.config.roles[self.index], timeout)
        return Status(model, waiting, running, address)

    async def cut(self) -> None:
        """Break off what the replica runs for the router. A late answer must not come."""
        if self.upstream is not None:
            upstream, self.upstream = self.upstream, None
            await upstream.close()


async def ask(upstream: Upstream, path: str, timeout: float) -> bytes:
    """The body of a 200. Raises UpstreamFailed."""
    status, body = await upstream.get(path, timeout)
    if status != 200:
        raise UpstreamFailed(f"{upstream.url} answers {path} with {status}")
    return body


async def model_of(upstream: Upstream, timeout: float) -> str:
    """Raises UpstreamFailed."""
    try:
        return str(json.loads(await ask(upstream, "/v1/models", timeout))["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise UpstreamFailed(f"{upstream.url} names no model") from None


async def address_of(upstream: Upstream, role: str, timeout: float) -> str | None:
    """From where a worker's blocks are fetched. Raises UpstreamFailed where its role is another."""
    try:
        told = json.loads(await ask(upstream, "/kv_transfer", timeout))
        if told["role"] == role:
            return None if told["address"] is None else str(told["address"])
    except (ValueError, LookupError, TypeError):
        pass
    raise UpstreamFailed(f"{upstream.url} is no {role} worker")
