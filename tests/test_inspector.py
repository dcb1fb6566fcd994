"""The page at `/`: what the server sends, and what the page does in a real browser.

The browser tests run headless Chromium against a small fake of the OpenAI API. The last word of the
question chooses what the fake does; where timing matters it waits at a gate that the test opens, so
nothing here depends on the speed of the machine.
"""

import asyncio
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from sse_starlette import EventSourceResponse

from common.http import page as inspector
from common.testing.page.browser import ENTER, ESCAPE, SHIFT, TAB, Page, chromium
from common.testing.parts import http_parts
from common.testing.server import running_server

STATIC = inspector.STATIC
FILES = sorted(path.name for path in STATIC.iterdir())


# --- what the server sends --------------------------------------------------------------------


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    inspector.mount(app)
    return TestClient(app)


def test_every_file_is_served_with_its_type_and_the_headers(client: TestClient) -> None:
    for name in FILES:
        path = "/" if name == "index.html" else f"/inspector/{name}"
        response = client.get(path)
        assert response.status_code == 200, path
        assert response.content == (STATIC / name).read_bytes()
        assert (
            response.headers["content-type"]
            == {
                "html": "text/html; charset=utf-8",
                "css": "text/css; charset=utf-8",
                "js": "text/javascript; charset=utf-8",
                "svg": "image/svg+xml; charset=utf-8",
            }[name.rpartition(".")[2]]
        )
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


HOSTILE_PATHS = [
    "/inspector/",
    "/inspector/index.html",
    "/inspector/nothing.js",
    "/inspector/../__init__.py",
    "/inspector/..%2f__init__.py",
    "/inspector/%2e%2e/__init__.py",
    "/inspector/..%5c__init__.py",
    "/inspector/app.js%00.css",
    "/inspector/app.js/",
    "/inspector//app.js",
    "/inspector/APP.JS",
    "/inspector//etc/passwd",
    "/inspector/%2fetc%2fpasswd",
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_no_other_path_leads_to_a_file(client: TestClient, path: str) -> None:
    status = asyncio.run(raw_get(client.app, path))
    assert status in {404, 307}, path  # 307: a slash at the end, sent to the exact path
    assert not inspector.is_public(path)


async def raw_get(app: Any, path: str) -> int:
    """The status of a GET whose path no client library has tidied."""
    statuses: list[int] = []

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": urllib.parse.unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"testserver")],
        "server": ("testserver", 80),
        "client": ("127.0.0.1", 1),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app(scope, receive, send)
    return statuses[0]


def test_public_paths_are_the_page_and_its_files_and_nothing_else(client: TestClient) -> None:
    expected = {"/"} | {f"/inspector/{name}" for name in FILES if name != "index.html"}
    assert expected == inspector.PUBLIC_PATHS
    assert all(map(inspector.is_public, expected))
    others = ["", "//", "/v1/models", "/health", "/inspector", "/inspector/", "/Inspector/app.js"]
    others += ["/inspector/app.js/", "/inspector/app.js?x", "/x/../inspector/app.js", "/v1/../"]
    assert not any(map(inspector.is_public, others))
    mounted = {route.path for route in client.app.routes if "inspector" in route.path}
    assert mounted == expected - {"/"}
    assert "/inspector/app.js" not in client.app.openapi()["paths"]


def test_the_assets_name_no_other_host_and_hold_nothing_inline() -> None:
    for name in FILES:
        text = (STATIC / name).read_text()
        urls = set(re.findall(r"""(?:[a-z]+:)?//[\w.-]+\.[a-z]+[^\s"')]*""", text))
        assert urls <= {"http://www.w3.org/2000/svg"}, name  # a namespace, which nothing fetches
        assert not re.search(r"@import|innerHTML|outerHTML|insertAdjacentHTML|\beval\b", text), name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<base|<iframe", text)
            assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", text))


# --- the fake server ---------------------------------------------------------------------------

CODE = "Here:\n\n```python\ndef reverse(items):\n    return items[::-1]\n```\n\nThat is all."
HOSTILE = (
    '<img src=x onerror="window.hacked = 1"></script><script>window.hacked = 2</script>'
    "\n```html\n<img src=x onerror='window.hacked = 3'>\n```\n&lt;b&gt; <b>bold</b>"
)
MULTIBYTE = "Grüße, 世界! 👩‍🚀🇩🇪 ünïcödé — ∑∞"


@dataclass
class Fake:
    """The fake's switches and what it saw."""

    api_key: str | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)  # the client went away
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def reset(self) -> None:
        self.api_key = None
        self.gate.clear()
        self.gone.clear()
        self.requests.clear()

    async def at_gate(self) -> None:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)


def event(data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\r\n\r\n".encode()


def content(text: str, finish_reason: str | None = None) -> bytes:
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return event({"choices": [choice], "usage": None})


def ending(num_tokens: int, finish_reason: str = "stop") -> bytes:
    usage = {"prompt_tokens": 5, "completion_tokens": num_tokens, "total_tokens": 5 + num_tokens}
    return content("", finish_reason) + event({"choices": [], "usage": usage}) + event("[DONE]")


async def answer(fake: Fake, scenario: str) -> AsyncIterator[bytes]:
    yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    yield b": ping\r\n\r\n"
    if scenario == "gate":
        for word in ["The ", "first ", "half"]:
            yield content(word)
        await fake.at_gate()
        yield content(" and the rest.") + ending(7)
    elif scenario == "endless":
        while True:
            yield content("on and ")
            await asyncio.sleep(0.02)
    elif scenario == "silent":
        await fake.at_gate()
    elif scenario == "bytes":
        whole = content(MULTIBYTE[:8]) + content(MULTIBYTE[8:]) + ending(2)
        for start in range(0, len(whole), 3):
            yield whole[start : start + 3]
            await asyncio.sleep(0.001)
    elif scenario == "broken":
        yield content("Some of ") + content("it")
        error = {"message": "the engine lost a page", "type": "server_error", "param": None}
        yield event({"error": error})
    elif scenario == "cut":
        yield content("Half an ans")
    elif scenario == "length":
        yield content("One ") + content("two") + ending(2, "length")
    else:
        text = {"code": CODE, "hostile": HOSTILE, "story": LONG_STORY}.get(
            scenario, "Fine, thanks."
        )
        for word in re.findall(r"\s*\S+\s*?", text):
            yield content(word)
            await asyncio.sleep(0.005)
        yield ending(len(text.split()) + 1)


LONG_STORY = "\n\n".join(
    f"Paragraph {i}. The lamp turned once a minute, and the sea answered each time."
    for i in range(20)
)

REFUSALS: dict[str, tuple[int, str, str | None]] = {
    "refuse": (400, "temperature must be between 0 and 100, not 300", "temperature"),
    "long": (400, "prompt has 9000 tokens; with a context of 8192 it may have 8191", "prompt"),
    "random": (400, "this model has no tokenizer: send token ids", None),
    "busy": (503, "too many requests are waiting", None),
}


def make_app(fake: Fake) -> FastAPI:
    app = FastAPI()
    inspector.mount(app)

    def error(status: int, message: str, param: str | None = None) -> JSONResponse:
        body = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        return JSONResponse({"error": body}, status)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Any:
        if request.headers.get("origin", fake.url) != fake.url:
            return error(403, "requests from this Origin are refused")  # as the real server does
        is_allowed = fake.api_key is None or inspector.is_public(request.url.path)
        if is_allowed or request.headers.get("authorization") == f"Bearer {fake.api_key}":
            return await call_next(request)
        return error(401, "a key is needed")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "fake-135m", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        fake.requests.append(body)
        scenario = body["messages"][-1]["content"].split()[-1]
        if scenario in REFUSALS:
            return error(*REFUSALS[scenario])

        async def stream() -> AsyncIterator[bytes]:
            finished = False
            try:
                async for piece in answer(fake, scenario):
                    yield piece
                finished = True
            finally:
                if not finished:
                    fake.gone.set()

        # Which closes the stream when the client goes, also while a piece is being sent.
        return EventSourceResponse(stream(), ping=3600)

    return app


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    fake = Fake()
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(make_app(fake), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield fake
    fake.gate.set()
    server.should_exit = True
    thread.join(10)


# --- the browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


class ChatPage(Page):
    """The page in the words of who chats."""

    def __init__(self, driver: Any, fake: Fake) -> None:
        super().__init__(driver, fake.url)
        self.fake = fake

    def ask(self, question: str) -> None:
        self.one("#prompt").send_keys(question, ENTER)

    @property
    def state(self) -> str:
        return self.js("return [...document.querySelectorAll('.turn')].at(-1)?.dataset.state ?? ''")

    @property
    def box(self) -> str:
        return self.js("return document.getElementById('prompt').value")

    @property
    def num_turns(self) -> int:
        return len(self.driver.find_elements("css selector", ".turn"))

    def wait_for(self, state: str) -> None:
        self.until(lambda: self.state == state)

    def wait_for_error(self) -> str:
        return self.until(lambda: self.text("#notice"))


@pytest.fixture
def page(driver: Any, fake: Fake) -> Iterator[ChatPage]:
    """The page, freshly opened and with nothing remembered; afterwards, no complaint in the console."""
    fake.reset()
    page = ChatPage(driver, fake)
    page.forget()
    page.open()
    yield page
    fake.gate.set()
    assert page.complaints() == []


browser = pytest.mark.browser


@browser
def test_text_appears_before_the_end_and_the_counts_become_exact(page: ChatPage) -> None:
    assert page.text("#model-name") == "fake-135m"
    page.ask("please gate")
    page.until(lambda: page.text(".answer-text") == "The first half")
    assert page.state == "streaming"
    page.until(lambda: page.text(".stat-tokens") == "≈ 3 tokens")
    assert re.fullmatch(r"[\d,]+ ms to first token", page.text(".stat-first"))
    page.fake.gate.set()
    page.wait_for("complete")
    assert page.text(".answer-text") == "The first half and the rest."
    assert page.text(".stat-tokens") == "7 tokens"
    assert re.fullmatch(r"[\d,]+\.\d tokens/s", page.text(".stat-rate"))
    assert page.text(".stat-note") == ""
    (request,) = page.fake.requests
    assert request == {
        "model": "fake-135m",
        "messages": [{"role": "user", "content": "please gate"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@browser
def test_history_goes_along_and_a_new_chat_forgets_it(page: ChatPage) -> None:
    page.ask("hello")
    page.wait_for("complete")
    page.ask("again")
    page.until(lambda: page.num_turns == 2 and page.state == "complete")
    roles = [message["role"] for message in page.fake.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert page.fake.requests[1]["messages"][1]["content"] == "Fine, thanks."
    page.one("#new-chat").click()
    assert page.num_turns == 0 and page.focused == "prompt"
    page.ask("afresh")
    page.wait_for("complete")
    assert len(page.fake.requests[2]["messages"]) == 1


@browser
def test_stop_keeps_the_text_and_the_server_sees_the_client_go(page: ChatPage) -> None:
    page.ask("endless")
    page.until(lambda: page.text(".answer-text").startswith("on and on"))
    page.one("#stop").click()
    page.wait_for("stopped")
    assert page.text(".stat-note") == "Stopped."
    assert page.text(".stat-tokens").startswith("≈")
    assert page.focused == "prompt" and page.one("#send").is_displayed()
    assert page.fake.gone.wait(20)
    kept = page.text(".answer-text")
    page.ask("and now")
    page.until(lambda: page.num_turns == 2 and page.state == "complete")
    said = page.fake.requests[1]["messages"][1]
    assert said["role"] == "assistant" and said["content"].startswith(kept)


@browser
def test_stop_before_the_first_token_gives_the_text_back(page: ChatPage) -> None:
    page.ask("silent")
    page.until(lambda: page.state == "waiting")
    page.one("#prompt").send_keys("typed since", ESCAPE)
    assert "back in the box" in page.wait_for_error()
    assert page.num_turns == 0 and page.box == "silent\n\ntyped since"
    assert page.fake.gone.wait(20)


@browser
def test_a_new_chat_during_an_answer_leaves_nothing_behind(page: ChatPage) -> None:
    page.ask("endless")
    page.until(lambda: page.state == "streaming")
    page.one("#new-chat").click()
    assert page.fake.gone.wait(20)
    page.fake.gone.clear()
    page.ask("silent")
    page.wait_for("waiting")
    page.one("#new-chat").click()
    assert page.fake.gone.wait(20)
    assert page.num_turns == 0 and page.box == "" and page.text("#notice") == ""
    page.ask("afresh")
    page.wait_for("complete")
    assert len(page.fake.requests[-1]["messages"]) == 1
    assert page.box == "" and page.text("#notice") == ""


@browser
def test_the_keyboard_is_enough(page: ChatPage) -> None:
    assert page.focused == "prompt"
    page.type("one", SHIFT, ENTER, SHIFT, "gate")
    assert page.box == "one\ngate" and page.num_turns == 0
    page.js(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.num_turns == 0  # an input method's Enter accepts a word
    page.type(ENTER)
    page.wait_for("streaming")
    assert page.text(".question-text") == "one\ngate"
    page.type("next", ENTER)
    assert page.num_turns == 1 and page.box == "next"  # one answer at a time; nothing is lost
    page.type(ESCAPE)
    page.wait_for("stopped")

    stops = []
    page.js("document.querySelector('.skip').focus()")
    for _ in range(7):
        stops.append(
            page.js("const e = document.activeElement; return e.id || e.className || e.tagName")
        )
        frame = "#composer" if stops[-1] == "prompt" else "*:focus"  # the box lights up its frame
        style = page.js(
            "return getComputedStyle(document.querySelector(arguments[0])).outlineStyle", frame
        )
        assert style != "none", stops
        page.type(TAB)
    assert stops == ["skip", "new-chat", "theme", "transcript", "SUMMARY", "prompt", "send"]

    page.js("document.querySelector('summary').focus()")
    page.type(ENTER, TAB, "Be brief.", TAB, "0")
    assert page.focused == "temperature"
    assert page.text(".settings-active") == "system prompt · temperature 0"
    page.type(ESCAPE)
    assert page.focused == "prompt" and not page.js("return settings.open")
    page.type(ENTER)
    page.until(lambda: page.num_turns == 2 and page.state == "complete")
    assert page.fake.requests[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.fake.requests[-1]["temperature"] == 0


@browser
def test_wrong_settings_are_refused_beside_their_fields(page: ChatPage) -> None:
    page.js("settings.open = true")
    wrong = {"temperature": "warm", "top_p": "1.5", "max_tokens": "2.5", "seed": "1e99"}
    for name, value in wrong.items():
        page.one(f"#{name}").send_keys(value)
    page.ask("hello")
    for name in wrong:
        assert page.text(f"#{name}-error") != ""
        assert page.one(f"#{name}").get_attribute("aria-invalid") == "true"
    assert page.focused == "temperature" and page.box == "hello" and page.fake.requests == []
    right = {"temperature": "0.5", "top_p": "1", "max_tokens": "12", "seed": "-7"}
    for name, value in right.items():
        page.one(f"#{name}").clear()
        page.one(f"#{name}").send_keys(value)
        assert page.text(f"#{name}-error") == ""
    page.ask("")
    page.wait_for("complete")
    sent = {name: page.fake.requests[0][name] for name in right}
    assert sent == {"temperature": 0.5, "top_p": 1, "max_tokens": 12, "seed": -7}


@browser
def test_a_refusal_is_shown_by_its_field_and_the_text_comes_back(page: ChatPage) -> None:
    page.ask("please refuse")
    page.until(lambda: page.text("#temperature-error"))
    assert page.text("#temperature-error") == REFUSALS["refuse"][1]
    assert page.focused == "temperature" and page.one("#temperature").is_displayed()
    assert page.box == "please refuse" and page.num_turns == 0
    page.type("1")
    assert page.text("#temperature-error") == ""


@browser
@pytest.mark.parametrize("scenario", ["long", "random", "busy"])
def test_other_refusals_are_shown_above_the_box(page: ChatPage, scenario: str) -> None:
    page.ask(scenario)
    assert page.wait_for_error() == REFUSALS[scenario][1]
    assert page.box == scenario and page.num_turns == 0 and page.one("#send").is_displayed()


@browser
def test_partial_answers_say_why_they_are_partial(page: ChatPage) -> None:
    page.ask("broken")
    page.wait_for("failed")
    assert page.text(".answer-text") == "Some of it"
    assert page.text(".stat-note") == "Failed: the engine lost a page"
    page.ask("cut")
    page.wait_for("interrupted")
    assert page.text(".answer-text") == "Half an ans"
    assert page.text(".stat-note").startswith("Interrupted:")
    page.ask("length")
    page.wait_for("complete")
    assert page.text(".stat-note") == "Cut at the token limit."
    assert page.box == ""


@browser
def test_a_server_that_is_away_is_named_and_nothing_is_lost(page: ChatPage) -> None:
    page.js("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.ask("are you there")
    assert "cannot be reached" in page.wait_for_error()
    assert page.box == "are you there" and page.num_turns == 0
    assert page.text("#model-name") == "no connection" and page.one("#retry").is_displayed()


@browser
def test_what_the_model_writes_is_shown_and_never_run(page: ChatPage) -> None:
    page.ask("hostile")
    page.wait_for("complete")
    assert page.text(".prose").strip() == HOSTILE.rpartition("```")[2].strip()
    assert page.text(".answer-text code") == "<img src=x onerror='window.hacked = 3'>"
    assert page.js("return document.querySelector('.answer-text p').textContent").startswith(
        "<img src=x"
    )
    assert (
        page.js("return document.querySelectorAll('.turns img, .turns script, .turns b').length")
        == 0
    )
    assert page.js("return window.hacked ?? null") is None
    page.ask("<img src=x onerror='window.hacked = 4'> hello")
    page.until(lambda: page.num_turns == 2 and page.state == "complete")
    assert page.js("return window.hacked ?? null") is None


@browser
def test_characters_cut_by_the_network_arrive_whole(page: ChatPage) -> None:
    page.ask("bytes")
    page.wait_for("complete")
    assert page.text(".answer-text") == MULTIBYTE


@browser
def test_fenced_code_is_code_and_can_be_copied(page: ChatPage) -> None:
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    page.ask("code")
    page.wait_for("complete")
    code = "def reverse(items):\n    return items[::-1]"
    assert page.text(".answer-text code") == code and page.text(".code-language") == "python"
    paragraphs = page.js(
        "return [...document.querySelectorAll('.prose')].map((p) => p.textContent)"
    )
    assert paragraphs == ["Here:", "That is all."]
    page.one(".code button").click()
    page.until(lambda: page.text(".code button") == "Copied")
    read = "navigator.clipboard.readText().then(arguments[0])"
    assert page.driver.execute_async_script(read) == code


@browser
def test_a_reader_who_scrolled_up_is_left_in_peace(page: ChatPage) -> None:
    page.ask("story")
    page.wait_for("complete")
    rest = "return transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight"
    page.until(lambda: page.js(rest) < 2)
    page.ask("endless")
    page.until(lambda: page.state == "streaming")
    page.js("transcript.scrollTop = 0")
    page.until(lambda: page.one("#jump").is_displayed())
    seen = len(page.text(".answer-text"))
    page.until(lambda: len(page.text(".answer-text")) > seen + 20)
    assert page.js("return transcript.scrollTop") == 0
    page.one("#jump").click()
    page.until(lambda: page.js(rest) < 2 and not page.one("#jump").is_displayed())
    page.type(ESCAPE)
    page.wait_for("stopped")


@browser
def test_the_key_is_asked_for_and_kept_for_the_tab(page: ChatPage) -> None:
    page.fake.api_key = "sesame"
    page.open()
    assert page.text("#model-name") == "locked" and page.focused == "key"
    page.type("wrong", ENTER)
    page.until(lambda: "refused" in page.text("#key-message"))
    page.type("not häder", ENTER)
    page.until(lambda: "letters" in page.text("#key-message"))
    page.one("#key").clear()
    page.one("#key").send_keys("sesame", ENTER)
    page.until(lambda: page.text("#model-name") == "fake-135m")
    assert not page.one("#key-form").is_displayed() and page.focused == "prompt"
    page.ask("hello")
    page.wait_for("complete")
    page.open()
    assert page.text("#model-name") == "fake-135m"
    assert page.js("return JSON.stringify(localStorage)") == "{}"
    page.fake.api_key = "changed"
    page.ask("hello again")
    page.until(lambda: page.one("#key-form").is_displayed())
    assert page.box == "hello again" and page.num_turns == 0


@browser
def test_dark_follows_the_system_and_the_toggle_is_remembered(page: ChatPage) -> None:
    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def is_dark() -> bool:
        channels = page.js("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", channels)[:3])) < 3 * 128

    prefer("light")
    assert not is_dark()
    prefer("dark")
    assert is_dark()
    page.one("#theme").click()
    assert not is_dark() and page.one("#theme").accessible_name == "Use the dark theme"
    page.open()
    assert not is_dark()
    page.one("#theme").click()
    assert is_dark() and page.js("return localStorage.length") == 0
    prefer("light")
    assert not is_dark()  # back in step with the system, so it follows again


@browser
def test_a_phone_shows_everything_within_its_width(page: ChatPage) -> None:
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open()
        page.js("settings.open = true")
        page.ask("code")
        page.wait_for("complete")
        assert page.js("return document.documentElement.scrollWidth") == 360
        for selector in ["#send", "#prompt", "#theme", "#new-chat", "summary", "#seed"]:
            box = page.one(selector).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360, selector
        assert page.one("#send").rect["height"] >= 44
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@browser
def test_a_screen_reader_hears_sentences_and_not_tokens(page: ChatPage) -> None:
    assert page.one("#transcript").get_attribute("aria-live") == "off"
    page.js(
        "window.heard = []; new MutationObserver(() => heard.push(announcer.textContent))"
        ".observe(announcer, {childList: true})"
    )
    page.ask("story")
    page.wait_for("complete")
    heard = page.js("return heard")
    assert heard[0] == "Sent." and heard[-1].endswith("tokens")
    assert "Paragraph 19." in heard[-1] and len(heard) < 20  # of 281 tokens
    for selector in ["#prompt", "#system", "#temperature", "#seed", "#key", "#theme", "#new-chat"]:
        page.js("settings.open = true")
        assert page.one(selector).accessible_name or selector == "#key", selector


@browser
def test_nothing_is_fetched_from_elsewhere(page: ChatPage) -> None:
    page.ask("hostile")
    page.wait_for("complete")
    names = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert any(name.endswith("/inspector/sse.js") for name in names)
    assert all(name.startswith(page.fake.url + "/") for name in names), names
    blocked = (
        "fetch('https://example.org/').then(() => arguments[0](false), () => arguments[0](true))"
    )
    assert page.driver.execute_async_script(f"const done = arguments[0]; {blocked}")
    log = page.driver.get_log("browser")  # and the policy says so in the console
    assert any("Content Security Policy" in entry["message"] for entry in log)


PARSE_AT_RANDOM_BORDERS = """
const [bytes, seed, done] = arguments;
import("/inspector/sse.js").then(async ({ readEvents }) => {
  const results = [];
  let state = seed;
  const next = (limit) => (state = (state * 48271) % 2147483647) % limit;
  for (let round = 0; round < 200; round++) {
    const whole = Uint8Array.from(bytes);
    const most = 1 + next(12);
    let at = 0;
    const body = new ReadableStream({
      pull(controller) {
        if (at >= whole.length) return controller.close();
        const end = Math.min(whole.length, at + next(most + 1));
        controller.enqueue(whole.slice(at, end));
        at = end;
      },
    });
    const events = [];
    for await (const { type, data } of readEvents(body)) events.push([type, data]);
    results.push(JSON.stringify(events));
  }
  done([...new Set(results)]);
}, (error) => done([String(error)]));
"""


@browser
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_events_are_read_whatever_the_borders_of_the_chunks(page: ChatPage, newline: str) -> None:
    lines = [
        "\ufeff: a comment",
        "data: Grüße 世界 👩‍🚀",
        "",
        "event: ping",
        "data:no space",
        "data:  two spaces",
        "data",
        "id: 7",
        "retry: 10",
        "",
        "event: without data",
        "",
        "",
        'data: {"a": "b: c"}',
        "",
        "data: [DONE]",
        "",
        "data: not ended",
    ]
    expected = [
        ["message", "Grüße 世界 👩‍🚀"],
        ["ping", "no space\n two spaces\n"],
        ["message", '{"a": "b: c"}'],
        ["message", "[DONE]"],
    ]
    whole = list(newline.join(lines).encode())
    seen = page.driver.execute_async_script(PARSE_AT_RANDOM_BORDERS, whole, 12345)
    assert [json.loads(one) for one in seen] == [expected]


SHOW_AT_RANDOM_BORDERS = """
const [text, done] = arguments;
import("/inspector/answer.js").then(({ AnswerText }) => {
  const shown = new Set();
  let state = 99;
  const next = (limit) => (state = (state * 48271) % 2147483647) % limit;
  for (let round = 0; round < 100; round++) {
    const root = document.createElement("div");
    const answer = new AnswerText(root);
    for (let end = 0; end < text.length; end += 1 + next(6)) answer.update(text.slice(0, end));
    answer.update(text);
    shown.add(JSON.stringify([...root.children].map((child) =>
      [child.tagName, (child.querySelector("code") ?? child).textContent])));
  }
  done([...shown]);
}, (error) => done([String(error)]));
"""


@browser
def test_an_answer_looks_the_same_however_it_was_cut(page: ChatPage) -> None:
    text = (
        "\n\nFirst  text\n\nsecond `inline`\n```py\nx = '``'\n``` not closed\n```\n\n"
        "between\n~~~\n```\n~~~\n``\n````md\n```\ninner\n```\n````\n```\nopen\n"
    )
    expected = [
        ["P", "First  text\n\nsecond `inline`"],
        ["FIGURE", "x = '``'\n``` not closed"],
        ["P", "between"],
        ["FIGURE", "```"],
        ["P", "``"],
        ["FIGURE", "```\ninner\n```"],
        ["FIGURE", "open"],
    ]
    seen = page.driver.execute_async_script(SHOW_AT_RANDOM_BORDERS, text)
    assert [json.loads(one) for one in seen] == [expected]


# --- the real servers -------------------------------------------------------------------------


@browser
@pytest.mark.parametrize("part", http_parts(first=2))
def test_the_real_server_talks_to_the_page(page: ChatPage, part: int) -> None:
    """A real model streams into the page, which counts what the server counts; Stop ends the work
    in the engine, as its trace shows."""
    with running_server(part, "--model", "smollm2-135m") as url:
        page.open(url)
        assert page.text("#model-name") == "smollm2-135m"
        page.js("settings.open = true")
        for name, value in {"temperature": "0", "max_tokens": "12"}.items():
            page.one(f"#{name}").send_keys(value)
        page.ask("What is the capital of France?")
        page.wait_for("complete")
        assert "Paris" in page.text(".answer-text")
        assert re.fullmatch(r"\d+ tokens", page.text(".stat-tokens"))
        page.one("#max_tokens").clear()
        with httpx.stream("GET", f"{url}/trace", timeout=60) as trace:
            page.ask("Tell me a very long story about the sea, in many chapters.")
            page.until(lambda: page.state == "streaming" and len(page.text(".answer-text")) > 40)
            page.type(ESCAPE)
            page.wait_for("stopped")
            assert any('"abort"' in line for line in trace.iter_lines()), "the engine went on"
        page.driver.get(f"{page.fake.url}/inspector/icon.svg")
