"""Raw HTTP for tests: requests that no client library would send, and a check of what comes back."""

import contextlib
import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

from common.testing.parts import ROOT

SECRET_PROMPT = [101, 202, 303]  # another client's
# What no answer may tell: places in the code or in memory, and the prompts of others.
INTERNALS = re.compile(r"Traceback|0x[0-9a-f]{6}|\.py\b|site-packages|token_id:|101, 202, 303")


def check_error(status: int, text: str, param: str | None = None) -> dict[str, Any]:
    """Check OpenAI's form, the field's name, and that no internals are in it; returns the error."""
    assert 400 <= status < 500, (status, text[:300])
    assert not INTERNALS.search(text), text[:300]
    assert str(ROOT) not in text and str(Path.home()) not in text, text[:300]
    assert len(text) < 2000, "an error repeats what was sent"
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["message"], str)
    if param is not None:
        assert re.fullmatch(re.escape(param) + r"([.\[].*)?", str(error["param"])), error
        assert error["message"].startswith(param), error
    return error


def send(url: str, data: bytes, timeout: float = 60.0) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes; returns status, headers and body. Raises ConnectionError without an answer."""
    host, port = re.fullmatch(r"http://(.*):(\d+)", url).groups()
    with socket.create_connection((host, int(port)), timeout=timeout) as sock:
        with contextlib.suppress(ConnectionError):  # it may answer before it has all
            sock.sendall(data)
        answer = http.client.HTTPResponse(sock, method=data[:4].decode("latin-1").strip())
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()


def raw_request(method: str, path: str, *headers: str, host: str | None = "127.0.0.1") -> bytes:
    """A raw request without a body."""
    lines = [f"{method} {path} HTTP/1.1", *headers, "Connection: close"]
    if host is not None:
        lines.insert(1, f"Host: {host}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def routes(app: Any) -> list[tuple[str, str]]:
    """(path, method) of every route of an app."""
    found = []
    for route in app.routes:
        path = re.sub(r"\{.*?\}", "x", route.path)
        found += [(path, method) for method in sorted(route.methods)]
    return found
