"""The engine beside the chat: pausing, saved traces, the connection; and the real engines."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.http.run import ServerConfig
from common.testing.page.browser import ENTER, HOME, RIGHT, SPACE, TAB, chromium
from common.testing.page.engine_page import (
    EnginePage,
    app_of,
    random_trace,
    run_step,
    serving,
    static_batch,
)
from common.testing.parts import http_parts
from common.testing.server import running_server, serving_thread
from common.trace import Trace

browser = pytest.mark.browser


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        driver.set_window_size(1400, 900)
        yield driver


@pytest.fixture
def serve(driver: Any) -> Iterator[Callable[..., EnginePage]]:
    with serving(driver) as serve:
        yield serve


# --- back and forth ---------------------------------------------------------------------------


@browser
def test_pause_and_step_with_the_keyboard_alone(serve: Callable[..., EnginePage]) -> None:
    """What is shown stays while the engine goes on, and the state belongs to the step shown."""
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    static_batch(trace)
    page.shows_step(2)
    page.js("document.querySelector('#engine-play').focus()")
    page.type(SPACE)
    page.until(lambda: page.status == "paused")
    run_step(trace, {"c": 5})
    assert page.one("#engine-play").accessible_name == "Back to the newest step"
    page.type(TAB, ENTER)
    page.shows_step(1)
    assert page.one("#engine-back").accessible_name == "One step back"
    page.shows_rows("b running 4 2", "a ended – 3", "c waiting 0 0")
    page.type(ENTER)
    page.shows_step(0)
    page.shows_rows("a running 20 3", "b running 3 2")
    page.type(ENTER)
    page.shows_step(0)
    page.type(TAB, ENTER)
    page.shows_step(1)
    page.type(TAB)
    assert page.focused == "engine-slider"
    page.type(RIGHT)
    page.shows_step(2)
    page.type(RIGHT)
    page.shows_step(2)  # the fourth came after the pause
    page.type(HOME)
    page.shows_step(0)
    assert page.one("#engine-slider").get_attribute("aria-valuetext") == page.step[0]
    page.one("#engine-play").click()
    page.until(lambda: page.status == "live")
    page.shows_step(3)
    page.shows_rows("b running 5 2", "c running 5 0", "a ended – 3")


@browser
def test_a_reader_who_is_late_starts_where_the_engine_is(serve: Callable[..., EnginePage]) -> None:
    trace = Trace(capacity=2, num_blocks=8, block_size=16)
    static_batch(trace)
    page = serve(trace)
    page.watch()
    page.shows_rows("b running 5 2", "a ended – 3", "c waiting 0 0")
    assert page.counts["blocks used"] == "5 / 8"
    run_step(trace, {"b": 1})
    page.shows_step(3)
    assert page.one("#engine-slider").get_attribute("min") == page.one(
        "#engine-slider"
    ).get_attribute("max"), "one step to go through"


# --- saved traces -----------------------------------------------------------------------------


def save(trace: Trace, folder: Path) -> Path:
    trace.save(folder / "saved.jsonl")
    return folder / "saved.jsonl"


@browser
def test_a_trace_is_saved_with_the_key_and_opens_again(
    serve: Callable[..., EnginePage], tmp_path: Path
) -> None:
    """The file is what `Trace.save` writes, also of steps from before the page was opened."""
    trace = random_trace(3, num_steps=60, capacity=40)
    page = serve(trace, api_key="sesame")
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    page.open()
    assert not page.one("#engine").is_displayed() and not page.one("#engine-toggle").is_displayed()
    page.type("sesame", ENTER)
    page.until(lambda: page.status == "live")
    page.one("#engine-save").click()
    downloaded = tmp_path / "trace.jsonl"
    page.until(downloaded.exists)
    assert downloaded.read_text() == "".join(trace.lines())
    assert Trace.load(downloaded).records() == trace.records()
    page.one("#engine-file").send_keys(str(downloaded))
    page.until(lambda: page.status == "trace.jsonl")
    assert page.step[0].startswith("Step 20 ")


@browser
def test_a_saved_trace_is_replayed(serve: Callable[..., EnginePage], tmp_path: Path) -> None:
    trace = random_trace(11, num_steps=80)
    live = Trace()
    page = serve(live)
    page.watch()
    page.one("#engine-file").send_keys(str(save(trace, tmp_path)))
    page.until(lambda: page.status == "saved.jsonl")
    for step, (_, state) in enumerate(trace.states()):
        page.shows_step(step)
        expected = {
            "running": f"{len(state.running)}",
            "waiting": f"{len(state.waiting)}",
            "blocks used": f"{len(set().union(*state.blocks.values()))} / 24",
        }
        assert page.counts.items() >= expected.items(), step
        page.js("document.querySelector('#engine-forward').click()")
    run_step(live, {"x": 1}, arrived={"x": 1})
    assert page.status == "saved.jsonl" and not page.one("#engine-save").is_displayed()
    page.js(
        "document.querySelector('#engine-speed').value = 10;"
        " document.querySelector('#engine-speed').dispatchEvent(new Event('change'))"
    )
    page.one("#engine-play").click()  # from its end it begins anew
    page.until(lambda: page.one("#engine-play").accessible_name == "Play")
    page.shows_step(79)
    page.one("#engine-live").click()
    page.until(lambda: page.status == "live")
    page.shows_rows("x running 1")
    assert page.focused == "engine-open"


@browser
def test_playing_follows_the_clock_of_the_trace(
    serve: Callable[..., EnginePage], tmp_path: Path
) -> None:
    """Ten steps an hour apart each wait for half a second at most; pausing stops between them."""
    trace = Trace()
    for step in range(10):
        run_step(trace, {"a": 1}, arrived={"a": 1})
        trace.records()[-1].begin = trace.records()[-1].end = 3600.0 * step
        trace.records()[-1].phases = []
    page = serve(Trace())
    page.watch()
    page.one("#engine-file").send_keys(str(save(trace, tmp_path)))
    page.shows_step(0)
    page.one("#engine-play").click()
    page.shows_step(2)
    page.one("#engine-play").click()
    page.until(lambda: page.one("#engine-play").accessible_name == "Play")
    at = page.step[0]
    assert at < "Step 9"
    page.one("#engine-back").click()
    page.until(lambda: page.step[0] < at)
    page.one("#engine-play").click()
    page.shows_step(9)


STATE = '{"num_blocks": 2, "step": -1}\n'
BAD_FILES = {
    "empty": ("", "line 1 is not an engine's state: it is not JSON."),
    "binary": ("\x89PNG\x00\xff", "line 1 is not an engine's state: it is not JSON."),
    "a list": ("[]\n", "line 1 is not an engine's state: it is no JSON object."),
    "other JSON": (
        '{"traceEvents": []}\n',
        "line 1 is not an engine's state: it has no num_blocks.",
    ),
    "no state": (
        '{"step": 3, "begin": 1}\n',
        "line 1 is not an engine's state: it has no num_blocks.",
    ),
    "blocks": (
        '{"num_blocks": 1e15, "step": 0}\n',
        "line 1 is not an engine's state: its num_blocks is wrong.",
    ),
    "owner": (
        '{"num_blocks": 2, "step": 0, "blocks": {"a": [-1]}}\n',
        "line 1 is not an engine's state: its blocks is wrong.",
    ),
    "cut": (
        STATE + '{"step": 0, "begin": 0, "end": 1}\n{"step": 1, "beg',
        "line 3 is not a step: it is not JSON.",
    ),
    "no end": (STATE + '{"step": 0, "begin": 0}\n', "line 2 is not a step: it has no end."),
    "null": (STATE + "null\n", "line 2 is not a step: it is no JSON object."),
    "tokens": (
        STATE + '{"step": 0, "begin": 0, "end": 1, "scheduled": {"a": "many"}}\n',
        "line 2 is not a step: its scheduled is wrong.",
    ),
    "phases": (
        STATE + '{"step": 0, "begin": 0, "end": 1, "phases": [["forward", 1]]}\n',
        "line 2 is not a step: its phases is wrong.",
    ),
    "huge": (
        STATE + '{"step": 0, "begin": 1e999, "end": 1}\n',
        "line 2 is not a step: its begin is wrong.",
    ),
}


@browser
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence(
    serve: Callable[..., EnginePage], tmp_path: Path, name: str
) -> None:
    content, reason = BAD_FILES[name]
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    (tmp_path / "bad.jsonl").write_text(content)
    page.one("#engine-file").send_keys(str(tmp_path / "bad.jsonl"))
    page.until(lambda: page.text("#engine-notice"))
    assert page.text("#engine-notice") == f"bad.jsonl is no saved trace: {reason}"
    assert page.one("#engine-notice").get_attribute("role") == "alert"
    static_batch(trace)
    page.shows_step(2)
    page.one("#engine-file").send_keys(str(save(trace, tmp_path)))
    page.shows_step(0)
    assert not page.one("#engine-notice").is_displayed() and page.status == "saved.jsonl"


@browser
def test_a_file_may_lack_what_is_empty_and_have_what_comes_later(
    serve: Callable[..., EnginePage], tmp_path: Path
) -> None:
    page = serve(Trace())
    page.watch()
    lines = [
        {"num_blocks": 0, "step": 6, "running": {"a": 5}, "host_blocks": 3},
        {"step": 7, "begin": 0.0, "end": 0.5, "scheduled": {"a": 1}, "swapped_out": ["b"]},
    ]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page.one("#engine-file").send_keys(str(tmp_path / "other.jsonl"))
    page.shows_step(7)
    page.shows_rows("a running 6")


# --- the connection, and what it costs ---------------------------------------------------------


@browser
def test_a_broken_connection_is_made_again(driver: Any) -> None:
    """Where no step was missed the history goes on; else it begins anew."""
    trace = Trace(num_blocks=8, block_size=16)
    config = ServerConfig(port=0)
    with serving_thread(app_of(trace, config), config) as url:
        page = EnginePage(driver, url)
        page.forget()
        page.watch()
        static_batch(trace)
        page.shows_step(2)
    page.until(lambda: page.status == "no connection")
    page.one("#engine-save").click()
    page.until(lambda: page.text("#engine-notice"))
    reason = "The server cannot be reached. Is it still running?"
    assert page.text("#engine-notice") == f"The trace was not saved. {reason}"
    config = ServerConfig(port=int(url.rpartition(":")[2]))
    with serving_thread(app_of(trace, config), config):
        page.until(lambda: page.status == "live")
        run_step(trace, {"b": 1})
        page.shows_step(3)
        assert page.one("#engine-slider").get_attribute("min") == "0"
        assert page.one("#engine-slider").get_attribute("max") == "3"
    page.until(lambda: page.status == "no connection")
    run_step(trace, {"b": 1})
    with serving_thread(app_of(trace, config), config):
        page.until(lambda: page.status == "live")
        run_step(trace, {"b": 1})
        page.shows_step(5)
        assert page.one("#engine-slider").get_attribute("max") == "0"
        page.shows_rows("b running 8 2", "a ended – 3", "c waiting 0 0")
    page.driver.get("about:blank")
    assert page.complaints() == []


COUNT_PAINTS = """
window.paints = 0;
const clear = CanvasRenderingContext2D.prototype.clearRect;
CanvasRenderingContext2D.prototype.clearRect = function (...args) {
  if (this.canvas.id === "engine-steps") window.paints += 1;
  return clear.apply(this, args);
};
"""


@browser
def test_a_closed_panel_costs_nothing_and_is_remembered(serve: Callable[..., EnginePage]) -> None:
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    page.until(lambda: len(trace._followers) == 1)  # an earlier page's may still be leaving
    toggle = page.one("#engine-toggle")
    assert toggle.get_attribute("aria-expanded") == "true" and toggle.accessible_name == "Engine"
    toggle.click()
    page.until(lambda: not trace._followers)
    assert not page.one("#engine").is_displayed()
    assert toggle.get_attribute("aria-expanded") == "false"
    page.open()
    assert not page.one("#engine").is_displayed() and not trace._followers
    static_batch(trace)
    page.one("#engine-toggle").click()
    page.until(lambda: page.status == "live")
    page.shows_rows("b running 5 2", "a ended – 3", "c waiting 0 0")
    assert page.js("return localStorage.length") == 0


@browser
def test_a_narrow_window_shows_one_of_the_two_and_paints_only_that(
    serve: Callable[..., EnginePage],
) -> None:
    trace = Trace(num_blocks=64, block_size=16)
    page = serve(trace)
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open()
        assert page.one("#prompt").is_displayed() and not page.one("#engine").is_displayed()
        page.until(lambda: trace._followers)
        page.js(COUNT_PAINTS)
        static_batch(trace)
        page.until(lambda: page.status != "" and not any(map(len, trace._followers)))
        assert page.js("return paints") == 0
        page.one("#engine-toggle").click()
        page.shows_rows("b running 5 2", "a ended – 3", "c waiting 0 0")  # what happened meanwhile
        assert page.js("return paints") > 0 and not page.one("#prompt").is_displayed()
        assert page.js("return document.documentElement.scrollWidth") == 360
        for control in page.driver.find_elements("css selector", "#engine button, #engine input"):
            if control.is_displayed():
                box = control.rect
                assert box["x"] >= 0 and box["x"] + box["width"] <= 360, control.id
        assert page.one("#engine-play").rect["height"] >= 44
        page.js("document.querySelector('.skip').click()")
        assert page.one("#prompt").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@browser
def test_many_steps_make_few_pictures(serve: Callable[..., EnginePage]) -> None:
    """One a frame at most; and fewer for readers who want little motion."""
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page.watch()
        page.js(COUNT_PAINTS + "window.began = performance.now()")
        for _ in range(20):
            for _ in range(100):
                run_step(trace, {"a": 1}, arrived={"a": 1})
            page.until(lambda: not any(map(len, trace._followers)))
        page.shows_step(1999)
        paints, seconds = page.js("return [paints, (performance.now() - began) / 1000]")
        assert 1 <= paints <= seconds + 2
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# --- the real engines -------------------------------------------------------------------------


@browser
@pytest.mark.parametrize("part", http_parts(first=2))
def test_the_real_engine_is_watched_and_its_trace_replayed(
    driver: Any, tmp_path: Path, part: int
) -> None:
    """After a chat and three requests side by side nothing is left, and the page's replay of the
    downloaded trace agrees with Python's at every step looked at."""
    has_blocks = part > 2
    flags = ["--num-blocks", "64", "--max-model-len", "512"] if has_blocks else []
    with running_server(part, "--model", "smollm2-135m", *flags) as url:
        page = EnginePage(driver, url)
        page.forget()
        page.watch()
        page.js("settings.open = true")
        page.one("#max_tokens").send_keys("12")
        page.one("#temperature").send_keys("0")
        page.one("#prompt").send_keys("Tell me a long story about the sea.", ENTER)
        page.until(lambda: page.text("#engine-running-count") == "1")
        page.until(lambda: page.text(".stat-tokens").startswith("12 tokens"))
        body = {"prompt": ["One", "Two", "Three"], "max_tokens": 5, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
        page.until(lambda: page.rows == [] and int(page.counts["steps"]) > 12)
        assert page.counts["running"] == page.counts["waiting"] == "0"
        assert page.counts.get("blocks used") == ("0 / 64" if has_blocks else None)
        (tmp_path / "trace.jsonl").write_bytes(httpx.get(f"{url}/trace.jsonl").content)
        trace = Trace.load(tmp_path / "trace.jsonl")
        assert sum(sum(record.arrived.values()) for record in trace.records()) > 10
        page.one("#engine-file").send_keys(str(tmp_path / "trace.jsonl"))
        for record, state in trace.states():
            page.shows_step(record.step)
            assert page.counts["running"] == str(len(state.running))
            assert page.counts["waiting"] == str(len(state.waiting))
            if has_blocks:
                assert page.counts["blocks used"] == f"{sum(map(len, state.blocks.values()))} / 64"
            page.js("document.querySelector('#engine-forward').click()")
        assert state.running == state.waiting == state.blocks == {}
        assert page.complaints() == []
        driver.get("about:blank")
