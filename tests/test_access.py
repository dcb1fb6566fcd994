"""Who may talk to a server: keys, and the hosts and origins it answers to.

The table of routes is walked whole, so that a route added later is under the same rule. Classes after
published holes of other servers.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from common.http.middleware import Guard
from common.http.run import ServerConfig
from common.testing.http import check_error, raw_request, routes, send
from common.testing.parts import engine_of, http_parts, module_of
from common.testing.server import serving_thread

MODEL = "random:tiny-llama"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module", params=http_parts(), ids=lambda part: f"part{part:02d}")
def part(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def url(part: int) -> Iterator[str]:
    """The base URL of a server that asks for no key."""
    with serving_thread(app_of(part, ServerConfig(port=0))) as url:
        yield url


def app_of(part: int, config: ServerConfig) -> Any:
    return module_of(part, "server").create_app(engine_of(part, MODEL, threads=1), config)


# Keys.

KEY = "secret-key-123"


@pytest.fixture(scope="module")
def keyed(part: int) -> Iterator[tuple[str, Any]]:
    """(base URL, app) of a server that asks for a key."""
    app = app_of(part, ServerConfig(port=0, api_key=KEY))
    with serving_thread(app) as url:
        yield url, app


WRONG_KEYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "wrong": ("Authorization: Bearer wrong",),
    "empty": ("Authorization: Bearer ",),
    "no value": ("Authorization:",),
    "prefix": (f"Authorization: Bearer {KEY[:-1]}",),
    "longer": (f"Authorization: Bearer {KEY}4",),
    "other case": (f"Authorization: Bearer {KEY.upper()}",),
    "no scheme": (f"Authorization: {KEY}",),
    "basic": (f"Authorization: Basic {KEY}",),
    "two spaces": (f"Authorization: Bearer  {KEY}",),
    "not ASCII": ("Authorization: Bearer \xff\xfe",),
    "another header": (f"X-API-Key: {KEY}",),
    "forwarded": ("X-Forwarded-For: 127.0.0.1", "X-Original-URL: /health"),
}


def is_open(path: str, method: str) -> bool:
    """What is said to need no key."""
    public = path == "/" or path.startswith("/inspector/")
    return method in ("GET", "HEAD") and (path == "/health" or public)


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_every_route_needs_the_key(keyed: tuple[str, Any], key: str) -> None:
    url, app = keyed
    table = routes(app)
    assert {path for path, _ in table} >= {"/health", "/v1/models", COMPLETIONS, CHAT}
    for path, method in table:
        status, headers, body = send(url, raw_request(method, path, *WRONG_KEYS[key]))
        assert KEY.encode() not in body
        if is_open(path, method):
            assert status == 200, (path, method, status)
        else:
            assert status == 401, (path, method, status)
            if method != "HEAD":
                check_error(status, body.decode())
        assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "path",
    [
        "/%761/models",
        "/%76%31/%6dodels",
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/models?x",
        "/v1/models?/health",
        "/v1/models#/health",
        "/V1/MODELS",
        "/Health",
        "/health/",
        "/health/x",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/health%2f..%2fv1/models",
        "/inspector/../v1/models",
        "/inspector/app.js/../../v1/models",
        "/inspector/",
        "/inspector",
        "/v1/models;/health",
        "/v1/models%00/health",
        "/v1/models%0a/health",
        "/v1/models%3f/health",
        "/./v1/models",
        "/openapi.json",
        "/openapi.json/",
        "/docs",
        "/trace",
        "/metrics",
        "http://127.0.0.1/v1/models",
        "http://127.0.0.1/health",
        "*",
    ],
)
def test_spellings_of_paths_need_the_key(keyed: tuple[str, Any], path: str) -> None:
    url, _ = keyed
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        status, _, _ = send(url, raw_request(method, path))
        assert status == 401, (method, status)


def test_the_right_key_opens(keyed: tuple[str, Any]) -> None:
    url, _ = keyed
    right = f"Authorization: Bearer {KEY}"
    assert send(url, raw_request("GET", "/v1/models", right))[0] == 200
    assert send(url, raw_request("GET", "/v1/models", right, right))[0] == 400
    wrong = "Authorization: Bearer wrong"
    assert send(url, raw_request("GET", "/v1/models", right, wrong))[0] == 400
    assert send(url, raw_request("GET", "/v1/models", wrong, right))[0] == 400
    # The key is no way around the rule about hosts, and health is none either.
    for path in ("/v1/models", "/health", "/"):
        assert send(url, raw_request("GET", path, right, host="evil.com"))[0] == 403
        assert send(url, raw_request("GET", path, host="evil.com"))[0] == 403


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key given goes through hmac.compare_digest, whole."""
    import hmac

    seen: list[bytes] = []
    compare = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        seen.append(a)
        return compare(a, b)

    monkeypatch.setattr("common.http.middleware.hmac.compare_digest", spy)
    app = app_of(1, ServerConfig(api_key=KEY))
    client = TestClient(app, base_url="http://127.0.0.1")
    given = [b"", b"Bearer s", b"Bearer " + KEY[:-1].encode(), b"Bearer " + KEY.encode()]
    for value in given:
        client.get("/v1/models", headers={"Authorization": value.decode()})
    assert seen == [value.replace(b"Bearer", b"bearer") for value in given]
    tree = ast.parse(Path(str(Guard.__init__.__code__.co_filename)).read_text())
    compares = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    named = [ast.unparse(node) for node in compares if "api_key" in ast.unparse(node)]
    assert named == ["self.config.api_key is not None"]


@pytest.mark.parametrize(
    "key", ["", " ", "\t\n", "with space", "line\nbreak", "schlüssel", "\udcff"]
)
def test_keys_that_cannot_work_are_refused_at_the_start(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^api_key must") as raised:
        ServerConfig(api_key=key)
    assert "\n" not in str(raised.value)
    if "\udcff" not in key:
        monkeypatch.setenv("ENGINE_API_KEY", key)
        with pytest.raises(ValueError, match=r"^api_key must"):
            ServerConfig()


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_API_KEY", KEY)
    assert ServerConfig().api_key == KEY
    assert ServerConfig(api_key="other").api_key == "other"
    client = TestClient(app_of(1, ServerConfig()), base_url="http://127.0.0.1")
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).is_success


# Hosts and origins: a page in the user's browser must not reach the server.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LocalHost:1", 200),
        ("[::1]", 200),
        ("[::1]:8000", 200),
        ("evil.com", 403),
        ("evil.com:8000", 403),
        ("127.0.0.1.evil.com", 403),
        ("localhost.evil.com", 403),
        ("evil.com#127.0.0.1", 403),
        ("127.0.0.1@evil.com", 403),
        ("127.0.0.1:8000@evil.com:80", 403),
        ("127.0.0.1:evil", 403),
        ("127.0.0.1, evil.com", 403),
        ("127.0.0.2", 403),
        ("0.0.0.0", 403),
        ("[::2]", 403),
        ("::1", 403),
        ("1", 403),
        (":8000", 403),
        ("", 403),
        (None, 400),
    ],
)
def test_hosts(url: str, host: str | None, status: int) -> None:
    """DNS rebinding: the attacker's name leads to 127.0.0.1, and the Host header says so."""
    for path in ("/health", "/v1/models"):
        assert send(url, raw_request("GET", path, host=host))[0] == status


def test_no_host_or_two(url: str) -> None:
    old = b"GET /v1/models HTTP/1.0\r\n\r\n"
    assert send(url, old)[0] == 403
    assert send(url, raw_request("GET", "/v1/models", "Host: evil.com"))[0] == 400


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [
        ("http://127.0.0.1:1234", True),
        ("https://127.0.0.1:1234", True),
        ("http://127.0.0.1", False),
        ("http://127.0.0.1:1235", False),
        ("http://localhost:1234", False),
        ("null", False),
        ("http://evil.com", False),
        ("http://127.0.0.1:1234.evil.com", False),
        ("http://evil.com/127.0.0.1:1234", False),
        ("file://127.0.0.1:1234", False),
        ("http://127.0.0.1:1234, http://evil.com", False),
        ("127.0.0.1:1234", False),
    ],
)
def test_origins(url: str, origin: str, is_own: bool) -> None:
    content = json.dumps(BASE)
    length = (f"Content-Length: {len(content)}", "Content-Type: application/json")
    for method, path, body in (("GET", "/v1/models", ""), ("POST", COMPLETIONS, content)):
        more = length if body else ()
        head = raw_request(method, path, f"Origin: {origin}", *more, host="127.0.0.1:1234")
        status, headers, text = send(url, head + body.encode())
        assert status == (200 if is_own else 403), text
        assert not any(name.startswith("access-control") for name in headers)
    preflight = ("Access-Control-Request-Method: POST", f"Origin: {origin}")
    status, headers, _ = send(
        url, raw_request("OPTIONS", COMPLETIONS, *preflight, host="127.0.0.1:1234")
    )
    assert status in (403, 405)
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    ("config", "host", "is_served"),
    [
        ({"host": "0.0.0.0"}, "engine.example", True),
        ({"host": "0.0.0.0", "allowed_hosts": "engine.example"}, "engine.example:80", True),
        ({"host": "0.0.0.0", "allowed_hosts": "engine.example"}, "evil.com", False),
        ({"host": "0.0.0.0", "allowed_hosts": "engine.example"}, "127.0.0.1", False),
        ({"host": "0.0.0.0", "allowed_hosts": ""}, "127.0.0.1", False),
        ({"host": "localhost"}, "evil.com", False),
        ({"host": "127.0.0.2"}, "evil.com", False),
        ({"host": "127.0.0.2"}, "127.0.0.2", True),
        ({"host": "127.1"}, "evil.com", False),
        ({"host": "2130706433"}, "evil.com", False),
        ({"host": "::1"}, "evil.com", False),
        ({"host": "192.168.7.7"}, "evil.com", False),
        ({"host": "192.168.7.7"}, "192.168.7.7:8000", True),
        ({"host": "::"}, "engine.example", True),
    ],
)
def test_hosts_follow_the_address(config: dict[str, str], host: str, is_served: bool) -> None:
    """Any name of loopback, in any spelling, has loopback's rule."""
    client = TestClient(app_of(1, ServerConfig(**config)), base_url="http://127.0.0.1")
    status = client.get("/health", headers={"Host": host}).status_code
    assert status == (200 if is_served else 403)


def test_a_named_origin_may_ask_and_read(part: int) -> None:
    """A page of an allowed origin gets its preflight and can read the answer; others get neither."""
    config = ServerConfig(allowed_origins="http://localhost:3000", api_key=KEY)
    client = TestClient(app_of(part, config), base_url="http://127.0.0.1")
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for origin, is_allowed in (("http://localhost:3000", True), ("http://localhost:3001", False)):
        headers = {"Origin": origin}
        asked = client.options(COMPLETIONS, headers=headers | preflight)
        answer = client.get("/health", headers=headers)
        assert (asked.status_code == 200) == is_allowed
        assert (answer.status_code == 200) == is_allowed
        for response in (asked, answer):
            named = response.headers.get("access-control-allow-origin")
            assert named == (origin if is_allowed else None)
        assert client.post(COMPLETIONS, headers=headers, json=BASE).status_code in (401, 403)


@pytest.mark.parametrize("origins", ["*", "localhost:3000", "http://a.example/x"])
def test_origins_must_be_origins(origins: str) -> None:
    with pytest.raises(ValueError, match=r"^allowed_origins must be origins"):
        ServerConfig(allowed_origins=origins)


def test_an_empty_host_is_not_every_interface() -> None:
    """What `bind` takes for 0.0.0.0."""
    with pytest.raises(ValueError, match=r"^host must not be empty"):
        ServerConfig(host="")
