"""`GET /metrics` of a router: its own numbers, and those of all its engines, told apart by `engine`."""

import asyncio
from typing import Any

from fastapi import Response

from common.http.metrics_routes import TEXT
from common.router.exposition import family, merge
from common.router.upstream import UpstreamFailed

SCRAPE_SECONDS = 5.0

# Name -> (kind, what it measures, its value for a replica).
PER_ENGINE = {
    "router:engine_up": ("gauge", "1 while the engine is well.", lambda r: r.is_well),
    "router:engine_draining": (
        "gauge",
        "1 while the engine gets no new requests.",
        lambda r: r.is_draining,
    ),
    "router:engine_breaker_state": (
        "gauge",
        "0 closed, 1 half open, 2 open.",
        lambda r: r.breaker.state,
    ),
    "router:engine_pending": (
        "gauge",
        "Requests that the engine has from the router.",
        lambda r: r.outstanding,
    ),
    "router:engine_load": (
        "gauge",
        "4 * waiting + running, as the router counts.",
        lambda r: r.load,
    ),
    "router:engine_requests_total": (
        "counter",
        "Requests sent to the engine.",
        lambda r: r.num_requests,
    ),
    "router:engine_failures_total": (
        "counter",
        "Requests that the engine failed.",
        lambda r: r.num_failures,
    ),
    "router:engine_restarts_total": (
        "counter",
        "Times that the engine was started again.",
        lambda r: r.num_restarts,
    ),
}
TOTALS = {
    "router:retries_total": (
        "Requests that were sent to another engine before their first token.",
        lambda router: router.num_retries,
    ),
    "router:broken_off_total": (
        "Streams that broke off after a token.",
        lambda router: router.num_broken_off,
    ),
    "router:prompt_pieces_total": (
        "Pieces of prompts that the cache-aware policy looked up.",
        lambda router: getattr(router.policy, "num_pieces", 0),
    ),
    "router:prompt_pieces_known_total": (
        "Pieces that it believes the chosen engine to have in its cache.",
        lambda router: getattr(router.policy, "num_matched", 0),
    ),
}


async def scrape(router: Any) -> Response:
    """The metrics of a router and of all its engines that answer."""

    async def read(replica: Any) -> tuple[str, str]:
        text = b""
        if (upstream := replica.link.upstream) is not None and replica.is_well:
            try:
                status, body = await upstream.get("/metrics", SCRAPE_SECONDS)
                text = body if status == 200 else b""
            except UpstreamFailed:
                pass  # `engine_up` tells
        return str(replica.index), text.decode(errors="replace")

    replicas = list(router.replicas.replicas)
    texts = await asyncio.gather(*map(read, replicas))
    text = own_metrics(router, replicas) + merge(texts)
    return Response(text, headers={"Content-Type": TEXT})


def own_metrics(router: Any, replicas: list[Any]) -> str:
    policy = {"policy": router.config.policy}
    text = family("router:engines", "gauge", "Engines, well or not.", [({}, len(replicas))])
    for name, (kind, about, value) in PER_ENGINE.items():
        samples = [({"engine": str(r.index)}, float(value(r))) for r in replicas]
        text += family(name, kind, about, samples)
    for name, (about, count) in TOTALS.items():
        text += family(name, "counter", about, [(policy, count(router))])
    return text
