"""One way to start a server: bind, load the model, say where, serve, and drain on SIGTERM."""

import asyncio
import ipaddress
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.device import release_openmp_workers
from common.options import option, validate

HEADER_SECONDS = 20.0  # for a request's headers to arrive
BACKLOG = 2048  # connections that may wait to be accepted
BACKLOG_SHARED = 8  # that one of several processes accepts at once, so that others have some


@dataclass(frozen=True)
class ServerConfig:
    """Where and for whom the server listens."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every interface")
    port: int = option(8000, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    served_model_name: str | None = option(
        None, "the model's name in the API (default: the name given by --model)"
    )
    api_key: str | None = option(
        None,
        "key that clients must send as 'Authorization: Bearer …' (default: the environment"
        " variable ENGINE_API_KEY; none: no key is asked for)",
    )
    max_waiting: int = option(
        256, "completions that may wait for their turn; beyond it a request gets a 503", minimum=0
    )
    max_body_size: int = option(8 << 20, "largest request body in bytes", minimum=1024)
    shutdown_timeout: int = option(
        30, "seconds that running requests have to finish after SIGTERM", minimum=0
    )
    allowed_hosts: str | None = option(
        None,
        "comma-separated Host names to answer to (default: loopback names when listening on"
        " loopback, any when listening on every interface, else the name given by --host)",
    )
    allowed_origins: str = option(
        "",
        "comma-separated browser origins, such as http://localhost:3000, beside the server's own",
    )
    access_log: bool = option(False, "log each request")

    def __post_init__(self) -> None:
        if self.api_key is None and "ENGINE_API_KEY" in os.environ:
            object.__setattr__(self, "api_key", os.environ["ENGINE_API_KEY"])
        validate(self)
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key must not be empty (it would admit everyone)")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError("api_key must be printable ASCII without spaces, to fit in a header")
        for origin in filter(None, map(str.strip, self.allowed_origins.split(","))):
            if not re.fullmatch(r"https?://[^/*]+", origin):
                raise ValueError(
                    f"allowed_origins must be origins such as http://localhost:3000, not {origin!r}"
                )
        if not self.host:
            raise ValueError("host must not be empty; 0.0.0.0 is every interface")
        if not self.host.isprintable():
            raise ValueError(f"host must be an address or a name, not {self.host!r}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server: by address, also one in words (127.1)."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            pass
        try:
            return ipaddress.ip_address(socket.gethostbyname(self.host)).is_loopback
        except (OSError, UnicodeError):
            return False


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, less patient: headers that do not arrive in time end the connection."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._header_timer is not None:
            self._header_timer.cancel()

    def _watch_headers(self) -> None:
        waiting = self._is_waiting()
        if waiting and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)
        elif not waiting and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if self._is_waiting() and not self.transport.is_closing():
            self.transport.close()

    def _is_waiting(self) -> bool:
        """Whether the client owes headers, or the rest of a body that was answered already."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)


class _Server(uvicorn.Server):
    """uvicorn that says, in one line, when and where it is ready, and tells the app when it ends."""

    on_ready: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.stopping = True
        await super().shutdown(sockets)


def make_server(app: FastAPI, config: ServerConfig, backlog: int = BACKLOG) -> _Server:
    """uvicorn as every part runs it: HTTP/1.1 only, no WebSockets, patient but not for ever."""
    return _Server(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            log_level="info" if config.access_log else "warning",
            access_log=config.access_log,
            backlog=backlog,
            timeout_graceful_shutdown=config.shutdown_timeout,
            server_header=False,
        )
    )


def bind(config: ServerConfig) -> socket.socket:
    """A socket bound to the configured address. Ends the process with one line when it cannot."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY: else small answers wait 40 ms for an ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host.strip("[]"), config.port))
    except (OSError, TypeError, UnicodeError) as error:  # the last two: no host name
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"error: cannot listen on {config.host} port {config.port}: {reason}")
    return sock


def exit_once(*_: Any) -> None:
    """End the process. A second SIGTERM must not interrupt the clean-up that this one begins."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def announce(sock: socket.socket, config: ServerConfig, begin: float) -> None:
    """Say where the server is. begin: when it was started, by `time.monotonic`."""
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"Ready after {time.monotonic() - begin:.1f} s: http://{host}:{port}", flush=True)
    if not config.is_loopback and config.api_key is None:
        print("Anyone who can reach this address can use it: see --api-key", flush=True)


def serve(
    build: Callable[[], FastAPI],
    config: ServerConfig,
    shared: socket.socket | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Bind, build the app (which loads the model), and serve until SIGTERM or Ctrl+C.

    After SIGTERM no new connection is taken and running requests have `shutdown_timeout` seconds.
    Bad models and busy ports end the process with one line and status 1.
    shared: a socket that other processes listen on too; on_ready: called in place of the line for users.
    """
    start = time.monotonic()
    signal.signal(signal.SIGTERM, exit_once)
    # A stream is cut by the timeout below, not the moment SIGTERM arrives.
    AppStatus.disable_automatic_graceful_drain()
    sock = shared or bind(config)
    try:
        app = build()
        release_openmp_workers()  # this thread has loaded the model; another will run it
        sock.listen(BACKLOG)  # the port may have been taken since
        server = make_server(app, config, BACKLOG_SHARED if shared else BACKLOG)
        port = sock.getsockname()[1]

        def ready() -> None:
            if shared:
                sock.listen(BACKLOG)  # asyncio's server has set what it accepts at once
            (on_ready or (lambda: announce(sock, config, start)))()

        server.on_ready = ready
        server.run(sockets=[sock])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not server.started:
        sys.exit(f"error: cannot listen on {config.host} port {port}: address already in use")
