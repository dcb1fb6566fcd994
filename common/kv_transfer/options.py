"""What an engine's settings mean for a sender and a receiver.

config: an engine's, with `role`, `kv_transfer`, `kv_host`, `kv_port`, `kv_secret_file`, `kv_secret`,
`kv_lease` and `kv_timeout`.
"""

from typing import Any

from common.kv_transfer.ticket import read_secret

ROLES, TRANSPORTS = ("both", "prefill", "decode", "proxy"), ("shm", "tcp", "nixl")
TELLING, ASKING = ("prefill", "proxy"), ("decode", "proxy")
# Settings that a worker's role has no use for.
OF_OTHERS = {
    "prefill": ("kv_timeout", "kv_min_tokens"),
    "decode": ("kv_transfer", "kv_host", "kv_port", "kv_lease"),
}


def check_role(config: Any) -> None:
    """Raises ValueError where a worker's role does not go with its other settings."""
    if config.role in ("prefill", "decode"):
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if (count := getattr(config, name, 1)) > 1:
                raise ValueError(f"{name} is {count}: role {config.role} is for one rank")
        if config.offload != "off":
            raise ValueError(f"offload is {config.offload}: role {config.role} has no host tier")
        if config.kv_secret_file is None and config.kv_secret is None:
            raise ValueError(f"role is {config.role}: kv_secret_file must be given")


def secret_of(config: Any) -> bytes:
    """What proxy and workers share. Raises ValueError."""
    if config.kv_secret_file is not None:
        return read_secret(config.kv_secret_file)
    return config.kv_secret.encode("latin-1")


def sender_options(config: Any) -> dict[str, Any]:
    """Raises ValueError."""
    return {
        "secret": secret_of(config),
        "transport": config.kv_transfer,
        "host": config.kv_host,
        "port": config.kv_port,
        "lease": config.kv_lease,
    }


def receiver_options(config: Any) -> dict[str, Any]:
    """Raises ValueError."""
    if config.role == "proxy":
        raise ValueError("role is proxy: it has no engine, and is started as a server")
    return {"secret": secret_of(config), "timeout": config.kv_timeout}
