"""Starts an engine core for a server's `main`. Only then are pyzmq and msgspec imported."""

import importlib.util
import sys
from dataclasses import asdict
from typing import Any, NoReturn

from common.engine_core.client import RemoteEngine
from common.http.run import ServerConfig


def check_packages() -> None:
    """Raises ValueError where pyzmq or msgspec is not installed."""
    for module, package in (("zmq", "pyzmq"), ("msgspec", "msgspec")):
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"an engine core in a process of its own needs {package}:"
                f" pip install {package}, or --engine-core thread"
            )


def launch_core(package: str, config: Any) -> RemoteEngine:
    """Start an engine in a process of its own, which ends with this one. Call it in a thread that stays.

    package: the part, whose `engine_core` is started. Raises ValueError when it does not start.
    """
    check_packages()
    from common.engine_core.process import CoreProcess

    core = CoreProcess(f"{package}.engine_core", asdict(config))
    return RemoteEngine(core.connect, core.health, config, core.end)


def serve_workers(package: str, config: Any, server: ServerConfig) -> NoReturn:
    """`config.api_server_count` HTTP processes in front of one core, until SIGTERM or Ctrl+C.

    package: the part, whose `engine_core` and `api_server` are started. When one of them does not
    start, this process ends with one line and status 1.
    """
    try:
        check_packages()
    except ValueError as error:
        sys.exit(f"error: {error}")
    from common.http.workers import Supervisor

    Supervisor(package, config, server, config.api_server_count).run()
