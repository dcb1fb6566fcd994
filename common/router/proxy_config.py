"""The settings of a proxy before prefill and decode workers: a router's, and how many there are of each."""

import secrets
from dataclasses import dataclass
from typing import Any, ClassVar

from common.kv_transfer.ticket import read_secret
from common.options import option, validate
from common.router.config import RouterConfig

NOT_HERE = ("data_parallel_size", "min_replicas", "max_replicas", "ray_address")


@dataclass(frozen=True)
class ProxyConfig(RouterConfig):
    """Which workers there are, and which of them a request goes to."""

    engine_fields: ClassVar[tuple[str, ...]] = ("role", "kv_secret_file")

    # workers
    num_prefill: int | None = option(None, "prefill workers to start (1)", 1, 1024)
    num_decode: int | None = option(None, "decode workers to start (1)", 1, 1024)
    prefill: tuple[str, ...] = option(
        (), "URL of a prefill worker that runs already; may be repeated"
    )
    decode: tuple[str, ...] = option(
        (), "URL of a decode worker that runs already; may be repeated"
    )

    def __post_init__(self) -> None:
        validate(self)
        for name in NOT_HERE:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect on a proxy: see num_prefill and num_decode")
        if self.replica or self.launcher != "local":
            name = "replica" if self.replica else "launcher"
            raise ValueError(f"{name} has no effect on a proxy: see prefill and decode")
        for first, second in (("prefill", "decode"), ("decode", "prefill")):
            if getattr(self, first) and not getattr(self, second):
                raise ValueError(f"{first} is given and {second} is not: both kinds are needed")
        for name in ("num_prefill", "num_decode"):
            if self.prefill and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect on the servers that --prefill names")
        object.__setattr__(self, "replica", self.prefill + self.decode)
        super().__post_init__()

    @property
    def roles(self) -> list[str]:
        """Of each worker by its index."""
        num_prefill = len(self.prefill) or self.num_prefill or 1
        num_decode = len(self.decode) or self.num_decode or 1
        return ["prefill"] * num_prefill + ["decode"] * num_decode

    @property
    def least(self) -> int:
        return len(self.roles)


def shared_secret(engine: Any, config: RouterConfig) -> str:
    """What proxy and workers share: a file's, or one made up for the workers that the proxy starts.

    engine: a config with `kv_secret_file`. Raises ValueError.
    """
    if engine.kv_secret_file is not None:
        return read_secret(engine.kv_secret_file).decode("latin-1")
    if config.replica:
        raise ValueError("kv_secret_file must be given: the secret of the workers that run already")
    return secrets.token_urlsafe(32)
