"""The router's settings, each also a command-line flag."""

import re
from dataclasses import dataclass
from typing import ClassVar

from common.options import option, validate

POLICIES = ("cache-aware", "least-pending", "round-robin", "session")
LAUNCHERS = ("local", "ray")
CACHE_AWARE = ("policy", ("cache-aware",))


@dataclass(frozen=True)
class RouterConfig:
    """How many engines there are, where they run, and which of them a request goes to."""

    # replicas
    data_parallel_size: int | None = option(
        None, "engines behind the router (2; fewer or more by load with --max-replicas)",
        1, 1024, aliases=("--dp",), excludes="max_replicas",
    )  # fmt: skip
    replica: tuple[str, ...] = option(
        (), "URL of a server that runs already, instead of engines of one's own; may be repeated"
    )
    replica_api_key: str | None = option(None, "key that the servers named by --replica want")
    launcher: str = option("local", "where engines run: processes, or actors", choices=LAUNCHERS)
    ray_address: str | None = option(
        None,
        "a running Ray to join (one is started here, on loopback)",
        needs=("launcher", ("ray",)),
    )
    min_replicas: int | None = option(None, "engines when there is little to do (1)", 1, 1024)
    max_replicas: int | None = option(None, "engines when there is much to do", 1, 1024)
    scale_up_pending: float = option(8.0, "requests per engine above which one is added", 0)
    scale_up_seconds: float = option(3.0, "seconds that there must be so many", 0)
    scale_down_pending: float = option(1.0, "requests per engine below which one is ended", 0)
    scale_down_seconds: float = option(60.0, "seconds that there must be so few", 0)
    # routing
    policy: str = option("cache-aware", "which engine a request goes to", choices=POLICIES)
    cache_threshold: float = option(
        0.3, "least share of a prompt that an engine must know", 0, 1, needs=CACHE_AWARE
    )
    balance_abs_threshold: int = option(
        32, "load beyond the least loaded engine's that is too much", 0, needs=CACHE_AWARE
    )
    balance_rel_threshold: float = option(
        1.5, "and times the least loaded engine's load", 1, needs=CACHE_AWARE
    )
    # faults
    max_retries: int = option(2, "times that a request without a token is tried again", 0, 16)
    response_timeout: float = option(600.0, "seconds without a byte from an engine", 0.1)
    health_interval: float = option(1.0, "seconds between looks at an engine", 0.05, 60)
    health_timeout: float = option(5.0, "seconds in which an engine says that it is well", 0.05, 60)
    start_timeout: float | None = option(
        None, "seconds in which an engine starts, or is ended and started anew (600)", 1
    )
    breaker_failures: int = option(5, "failures in a row that take an engine out", 1)
    breaker_seconds: float = option(10.0, "seconds before it gets a request again", 0)

    def __post_init__(self) -> None:
        validate(self)
        for url in self.replica:
            if not re.fullmatch(r"https?://[^/\s?#]+", url.rstrip("/")):
                raise ValueError(f"replica must be a URL such as http://host:8000, not {url!r}")
        if len({url.rstrip("/") for url in self.replica}) < len(self.replica):
            raise ValueError("replica names the same URL twice")
        for name in ("data_parallel_size", "min_replicas", "max_replicas", "start_timeout"):
            if self.replica and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect on the servers that --replica names")
        if self.replica and self.launcher != "local":
            raise ValueError(f"launcher is {self.launcher}: with --replica nothing is launched")
        if self.replica_api_key is not None and not self.replica_api_key.strip():
            raise ValueError("replica_api_key must not be empty")
        if self.max_replicas is None and self.min_replicas is not None:
            raise ValueError("min_replicas has no effect without max_replicas")
        if self.least > self.most:
            raise ValueError(f"min_replicas is {self.least}, above max_replicas, {self.most}")

    engine_fields: ClassVar[tuple[str, ...]] = ()  # that matter to the router itself

    @property
    def roles(self) -> list[str]:
        """Of each replica by its index, where they differ."""
        return []

    @property
    def least(self) -> int:
        """Replicas at the start, and while there is little to do."""
        if self.replica:
            return len(self.replica)
        return self.min_replicas or (1 if self.max_replicas else self.data_parallel_size or 2)

    @property
    def most(self) -> int:
        """Replicas while there is much to do."""
        return self.max_replicas or self.least
