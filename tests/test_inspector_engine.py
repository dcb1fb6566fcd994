"""The engine beside the chat: what the page makes of a trace, in a real browser.

The server is the real one around a trace that the test writes step by step, so that each picture can
be told in advance.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common.testing.page.browser import DOWN, END, HOME, LEFT, RIGHT, TAB, UP, Page, chromium
from common.testing.page.engine_page import (
    EnginePage,
    random_trace,
    run_step,
    serving,
    static_batch,
)
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


STATES = """
const [text, done] = arguments;
const { readTrace } = await import("/inspector/engine-records.js");
const { first, records } = readTrace(text);
done(records.map((record) => {
  first.apply(record);
  return JSON.stringify(first);
}));
"""

HISTORY = """
const [text, capacity, positions, done] = arguments;
const { readTrace } = await import("/inspector/engine-records.js");
const { History } = await import("/inspector/engine-history.js");
const { first, records } = readTrace(text);
const history = new History(first, capacity);
for (const record of records) history.append(record);
const stateAfter = (one, position) => JSON.stringify(one.stateAfter(position));
const frozen = history.copy();
const before = positions.map((position) => stateAfter(history, position));
for (const record of records) history.append(record);
done({ begin: frozen.begin, end: frozen.end, before,
  frozen: positions.map((position) => stateAfter(frozen, position)) });
"""


def run_module(page: Page, script: str, *args: Any) -> Any:
    """A script of the page that may await; its last argument takes the result."""
    wrapped = f"(async (...arguments_) => {{ {script.replace('arguments', 'arguments_', 1)} }})"
    failed = "(error) => arguments[arguments.length - 1](String(error))"
    return page.driver.execute_async_script(f"{wrapped}(...arguments).catch({failed})", *args)


def python_states(trace: Trace) -> list[str]:
    return [json.dumps(vars(state), separators=(",", ":")) for _, state in trace.states()]


# --- the same state on both sides -------------------------------------------------------------


@browser
@pytest.mark.parametrize("seed", range(5))
def test_the_page_and_python_make_the_same_of_every_record(
    serve: Callable[..., EnginePage], seed: int
) -> None:
    """To the order of the sequences and of their blocks. The trace begins within its history."""
    page = serve(Trace())
    page.open()
    trace = random_trace(seed, capacity=150)
    expected = python_states(trace)
    assert run_module(page, STATES, "".join(trace.lines())) == expected
    for field in (
        "preempted",
        "freed",
        "finished",
        "arrived",
        "cached",
        "rejected",
    ):  # each of which must matter
        lines = [json.loads(line) for line in "".join(trace.lines()).splitlines()]
        for line in lines[1:]:
            line[field] = type(line[field])()
        text = "\n".join(map(json.dumps, lines)) + "\n"
        assert run_module(page, STATES, text) != expected, field


@browser
def test_any_step_of_a_history_can_be_shown(serve: Callable[..., EnginePage]) -> None:
    """In any order, also when the oldest steps are dropped, and while more come in."""
    page = serve(Trace())
    page.open()
    trace = random_trace(7)
    expected = python_states(trace)
    for capacity in (1000, 50):
        begin = max(0, 200 - capacity)
        positions = [random.Random(capacity).randrange(begin, 200) for _ in range(60)]
        seen = run_module(page, HISTORY, "".join(trace.lines()), capacity, positions)
        assert (seen["begin"], seen["end"]) == (begin, 200)
        assert seen["before"] == seen["frozen"] == [expected[position] for position in positions]


# --- what is shown ----------------------------------------------------------------------------


@browser
def test_a_static_batch_is_shown_as_it_runs(serve: Callable[..., EnginePage]) -> None:
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    assert page.rows == [] and page.text("#engine-rest") == "None."
    assert page.step[0].startswith("No step yet")
    static_batch(trace)
    page.shows_rows("b running 5 2", "a ended – 3", "c waiting 0 0")
    assert page.counts == {
        "running": "1",
        "waiting": "1",
        "blocks used": "5 / 8",
        "steps": "3",
        "tokens in the step": "2",
    }
    title, phases, changes, tokens = page.step
    assert title.startswith("Step 2 · 2 tokens · ") and title.endswith(" ms")
    assert phases.startswith("forward ") and changes == ""
    assert tokens == "Tokens: 1 each for a (ended), b"
    run_step(trace, {"b": 1}, finished={"b": "stop"}, freed={"a": [2, 1, 0], "b": [4, 3]})
    page.shows_rows("c waiting 0 0")
    assert page.counts["blocks used"] == "0 / 8"
    assert page.step[2] == "Finished: b (stop)"


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_blocks_have_their_owners_colours(serve: Callable[..., EnginePage], scheme: str) -> None:
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.watch()
    static_batch(trace)
    page.shows_rows("b running 5 2", "a ended – 3", "c waiting 0 0")

    def cell(block: int) -> tuple[float, float]:
        return page.block(block, 8, 24)

    b, a = page.swatch(0), page.swatch(1)
    assert a != b
    assert page.colours_at("#engine-blocks", *cell(3)) == {b}, "5 of b's tokens are in its first"
    reserved = page.colours_at("#engine-blocks", *cell(4))
    free = page.colours_at("#engine-blocks", *cell(5))
    assert len({*reserved, *free, b}) == 3, "reserved is neither full nor free"
    x, y = cell(1)
    hatched = page.colours_at("#engine-blocks", x - 6, y - 6, 12)
    assert len(hatched) > 3, "lines and what is between"
    assert page.colours_at("#engine-blocks", 10, 30) == {(0, 0, 0, 0)}, "a picture of one row"

    words = {
        0: "Block 0: a, block 1 of its 3, held until its batch ends",
        3: "Block 3: b, block 1 of its 2, 5 of 16 tokens",
        4: "Block 4: b, block 2 of its 2, reserved, empty",
        5: "Block 5: free",
    }
    for block, text in words.items():
        page.point("#engine-blocks", *cell(block))
        page.until(lambda text=text: page.text("#engine-block") == text)
        assert page.one("#engine-blocks").get_attribute("title") == text
    page.one("#theme").click()
    page.until(lambda: page.swatch(0) != b)
    page.until(lambda: page.colours_at("#engine-blocks", *cell(3)) == {page.swatch(0)})


@browser
def test_the_map_is_walked_with_the_keys(serve: Callable[..., EnginePage]) -> None:
    trace = Trace(num_blocks=64, block_size=16)
    run_step(trace, {})
    page = serve(trace)
    page.watch()
    page.js("document.querySelector('#engine-blocks').focus()")
    columns = int(page.js("return document.querySelector('#engine-blocks').clientWidth") / 24)
    for key, block in (
        (RIGHT, 1),
        (DOWN, columns + 1),
        (LEFT, columns),
        (END, 63),
        (RIGHT, 63),
        (HOME, 0),
        (LEFT, 0),
    ):
        page.type(key)
        page.until(lambda block=block: page.text("#engine-block") == f"Block {block}: free")
    page.type(TAB)
    page.until(lambda: page.text("#engine-block").startswith("Point at a cell"))


@browser
@pytest.mark.parametrize(
    ("num_blocks", "scale"), [(1, 1), (4, 1), (64, 1), (2912, 1), (50_000, 10), (1_000_000, 200)]
)
def test_any_number_of_blocks_fits(
    serve: Callable[..., EnginePage], num_blocks: int, scale: int
) -> None:
    """Every block has a place in the picture, and the caption says how many share one."""
    trace = Trace(num_blocks=num_blocks, block_size=16)
    page = serve(trace)
    page.watch()
    trace.arrived("a", 3)
    run_step(trace, {"a": 3}, allocated={"a": [num_blocks - 1]})
    page.until(lambda: page.rows == [["a", "running", "3", "1"]])
    box = page.one("#engine-blocks").rect
    assert box["height"] <= 224
    caption = page.text("#engine-scale")
    assert caption.startswith(f"{num_blocks:,} block") and ("a cell is a block" in caption) == (
        scale == 1
    )
    assert scale == 1 or f"a cell is {scale} blocks" in caption
    page.js("document.querySelector('#engine-blocks').focus()")
    page.type(END)
    last = "Block" if scale == 1 else f"Blocks {num_blocks - scale} to"
    page.until(lambda: page.text("#engine-block").startswith(f"{last} {num_blocks - 1}: a"))
    assert page.is_painted("#engine-blocks", page.swatch(0))


@browser
def test_a_cell_of_many_blocks_says_who_has_them(serve: Callable[..., EnginePage]) -> None:
    trace = Trace(num_blocks=50_000, block_size=16)
    page = serve(trace)
    page.watch()
    allocated = {"a": [0, 1, 2], "b": [3, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]}
    run_step(trace, {"a": 1, "b": 1}, arrived={"a": 1, "b": 1}, allocated=allocated)
    page.until(lambda: page.counts.get("blocks used") == "14 / 50,000")
    page.js("document.querySelector('#engine-blocks').focus()")
    page.type(HOME)
    for words in (
        "Blocks 0 to 9: a 3, b 1, free 6",
        "Blocks 10 to 19: free 10",
        "Blocks 20 to 29: b 10, free 0",
    ):
        page.until(lambda words=words: page.text("#engine-block") == words)
        page.type(RIGHT)


@browser
def test_what_an_engine_does_not_do_is_not_shown(serve: Callable[..., EnginePage]) -> None:
    """No blocks, no map; no preemption, no row for it; nothing in vain, no word about it."""

    def legends(page: EnginePage) -> dict[str, bool]:
        names = ("vain", "reserved", "ended", "map")
        return {name: page.one(f"#engine-{name}").is_displayed() for name in names}

    trace = Trace()
    page = serve(trace)
    page.watch()
    run_step(trace, {"a": 9}, arrived={"a": 9, "b": 1})
    page.shows_rows("a running 9", "b waiting 0")
    assert set(page.counts) == {"running", "waiting", "steps", "tokens in the step"}
    assert not any(legends(page).values())

    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    run_step(trace, {"a": 16}, arrived={"a": 16, "b": 1}, allocated={"a": [0]})
    page.shows_rows("a running 16 1", "b waiting 0 0")
    assert legends(page) == {"vain": False, "reserved": False, "ended": False, "map": True}
    height = page.one("#engine-steps").rect["height"]
    run_step(trace, {"a": 1}, allocated={"a": [1, 2]}, freed={"b": []})
    page.until(lambda: legends(page)["reserved"])
    run_step(trace, {"b": 1}, preempted=["a"], freed={"a": [2, 1, 0]})
    page.shows_rows("b running 1 0", "a waiting 0 0")
    assert page.step[2] == "Preempted: a"
    page.until(lambda: page.one("#engine-steps").rect["height"] == height + 13)
    run_step(trace, {"b": 1, "a": 17}, allocated={"a": [5, 6]}, finished={"b": "stop"})
    run_step(trace, {"b": 1, "a": 1})
    page.until(lambda: legends(page)["vain"])
    assert not legends(page)["ended"], "b has no blocks"


@browser
def test_what_a_prefix_cache_found_is_shown(serve: Callable[..., EnginePage]) -> None:
    """In numbers, in words, and in the map: a block of several has the colours of all."""
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    run_step(trace, {"a": 40}, arrived={"a": 40}, allocated={"a": [0, 1, 2]})
    page.shows_rows("a running 40 3")
    assert not page.one("#engine-shared").is_displayed()
    changes = {"arrived": {"b": 40, "c": 9}, "allocated": {"b": [0, 1, 3]}, "cached": {"b": 32}}
    run_step(trace, {"a": 1, "b": 8}, **changes)
    page.shows_rows("a running 41 – 3", "b running 8 32 3", "c waiting 0 – 0")
    assert page.step[2] == "Arrived: b (40 tokens), c (9 tokens). Cached: b (32 tokens)"
    assert page.counts["blocks used"] == "4 / 8" and page.one("#engine-shared").is_displayed()
    a, b = page.swatch(0), page.swatch(1)
    x, y = page.block(1, 8, 24)
    left, right = (page.colours_at("#engine-blocks", x + by, y) for by in (-6, 6))
    assert (left, right) == ({a}, {b})
    x, y = page.block(3, 8, 24)
    assert page.colours_at("#engine-blocks", x - 6, y) == {b}, "full: 40 tokens are in b's blocks"
    words = {
        1: "Block 1: a, block 2 of its 3, 16 of 16 tokens; also b",
        3: "Block 3: b, block 3 of its 3, 8 of 16 tokens",
    }
    for block, text in words.items():
        page.point("#engine-blocks", *page.block(block, 8, 24))
        page.until(lambda text=text: page.text("#engine-block") == text)
    run_step(trace, {"c": 9}, finished={"a": "stop"}, freed={"a": [2, 1, 0]}, cached={"c": 0})
    page.shows_rows("b running 8 32 3", "c running 9 0 0")
    assert page.counts["blocks used"] == "3 / 8" and page.step[2] == "Finished: a (stop)"
    run_step(trace, {"c": 1}, preempted=["b"], freed={"b": [3, 1, 0]})
    page.shows_rows("c running 10 0 0", "b waiting 0 – 0")
    page.open()  # who comes later sees the column too
    page.shows_rows("c running 10 0 0", "b waiting 0 – 0")


@browser
def test_the_timeline_shows_prompts_beside_single_tokens(serve: Callable[..., EnginePage]) -> None:
    """A bar's height is the root of its tokens; within it each sequence has its share."""
    trace = Trace()
    page = serve(trace)
    page.watch()
    run_step(trace, {"a": 900, "b": 300}, arrived={"a": 900, "b": 300})
    run_step(trace, {"a": 3, "b": 9})
    page.shows_step(1)
    width = page.one("#engine-steps").rect["width"]
    owners = [page.swatch(0), page.swatch(1)]

    def heights(step: int) -> list[int]:
        """Pixels of a's and of b's share of a bar."""
        x = 70 + (step + 0.4) * (width - 70) / 100
        column = [page.colours_at("#engine-steps", x, y) for y in range(140)]
        return [column.count({owner}) for owner in owners]

    assert heights(0) == [pytest.approx(84, abs=2), pytest.approx(28, abs=2)]
    assert heights(1) == [pytest.approx(2.8, abs=2), pytest.approx(8.4, abs=2)]
    assert heights(2) == [0, 0]
    run_step(trace, {"a": 1, "b": 1}, finished={"a": "stop"})
    run_step(trace, {"a": 1, "b": 1})
    page.shows_step(3)
    page.point("#engine-steps", 70 + 2.5 * (width - 70) / 100, 50)
    page.shows_step(2)
    assert page.step[2] == "Finished: a (stop)" and page.counts["steps"] == "4"
    page.point("#engine-steps", 0, 0, "pointerleave")
    page.shows_step(3)
    page.point("#engine-steps", 70 + 0.5 * (width - 70) / 100, 50, "click")
    page.shows_step(0)
    page.until(lambda: page.counts["steps"] == "1" and page.status == "paused")


@browser
def test_names_are_text_whatever_they_are(serve: Callable[..., EnginePage]) -> None:
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    names = ["<img src=x onerror='window.hacked = 1'>", "__proto__", "constructor", "7", "名 前"]
    for name in names:
        trace.arrived(name, 3)
    run_step(trace, dict.fromkeys(names[:3], 3), allocated={names[1]: [0, 1]})
    page.until(lambda: len(page.rows) == 5)
    assert {row[0] for row in page.rows} == set(names)
    assert page.counts["blocks used"] == "2 / 8"
    run_step(trace, {}, finished=dict.fromkeys(names, "stop"), freed={names[1]: [0, 1]})
    page.until(lambda: page.rows == [])
    assert page.js("return window.hacked ?? null") is None
    assert page.js("return {}.polluted ?? Object.keys(Object.prototype).length") == 0


@browser
def test_hundreds_of_sequences_are_cut_in_the_table(serve: Callable[..., EnginePage]) -> None:
    trace = Trace()
    page = serve(trace)
    page.watch()
    names = [f"request-{i}" for i in range(300)]
    run_step(trace, dict.fromkeys(names[:256], 1), arrived=dict.fromkeys(names, 1))
    page.until(lambda: page.text("#engine-rest") == "and 236 more")
    assert len(page.rows) == 64 and page.counts["running"] == "256"
    assert page.step[3].endswith("request-23 and 232 more")


@browser
def test_owners_colours_can_be_seen_and_told_apart(serve: Callable[..., EnginePage]) -> None:
    """3:1 against the panel in both themes; neighbours, and no two of the same colour at one time."""
    trace = Trace()
    page = serve(trace)
    page.watch()
    names = [f"request-{i}" for i in range(12)]
    run_step(trace, dict.fromkeys(names, 1), arrived=dict.fromkeys(names, 1))
    page.until(lambda: len(page.rows) == 12)
    for _ in range(2):
        ground = [
            int(part)
            for part in page.js(
                "return getComputedStyle(document.querySelector('#engine')).backgroundColor"
                ".match(/\\d+/g)"
            )[:3]
        ]
        colours = [page.swatch(row) for row in range(12)]
        assert len(set(colours)) == 12
        for colour in colours:
            assert contrast(colour[:3], ground) >= 3, (colour, ground)
        page.one("#theme").click()
        page.until(lambda colours=colours: page.swatch(0) != colours[0])
    colours = [page.swatch(row) for row in range(12)]
    run_step(trace, {"request-0": 1}, finished={"request-0": "stop", "request-5": "stop"})
    run_step(trace, {"new": 1, "newer": 1}, arrived={"new": 1, "newer": 1})
    page.until(lambda: len(page.rows) == 12 and page.rows[-1][0] == "newer")
    assert {page.swatch(10), page.swatch(11)} == {colours[0], colours[5]}


def contrast(one: Any, other: Any) -> float:
    """WCAG's contrast ratio of two colours of 0 to 255."""

    def luminance(colour: Any) -> float:
        shares = [value / 255 for value in colour]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# --- without eyes or hands --------------------------------------------------------------------


@browser
def test_every_control_has_a_name_and_a_place_in_the_tab_order(
    serve: Callable[..., EnginePage],
) -> None:
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    static_batch(trace)
    page.shows_step(2)
    page.js("document.querySelector('#engine-save').focus()")
    stops = []
    for _ in range(7):
        stops.append(page.focused)
        assert page.one(f"#{page.focused}").accessible_name, stops
        page.type(TAB)
    names = ("save", "open", "play", "back", "forward", "slider", "blocks")
    assert stops == [f"engine-{name}" for name in names]
    for selector in ("#engine", "#engine-steps", "#engine-sequences", "#engine-file"):
        assert page.js(
            "return document.querySelector(arguments[0]).ariaLabel"
            " ?? document.querySelector(arguments[0]).getAttribute('aria-labelledby')",
            selector,
        )
    headers = page.js(
        "return [...document.querySelectorAll('.sequences thead th')].map((th) => th.scope)"
    )
    assert headers == ["col"] * 5


@browser
def test_counts_are_spoken_seldom_and_only_to_who_is_there(
    serve: Callable[..., EnginePage],
) -> None:
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace)
    page.watch()
    announcer = "document.querySelector('#engine-announcer')"
    page.js(
        f"window.heard = []; new MutationObserver(() => heard.push({announcer}.textContent))"
        f".observe({announcer}, {{ childList: true }})"
    )
    assert page.one("#engine-announcer").get_attribute("aria-live") == "polite"
    static_batch(trace)
    page.shows_step(2)
    assert page.focused == "prompt" and page.js("return heard") == []
    page.js("document.querySelector('#engine-slider').focus()")
    for number in range(50):
        run_step(trace, {"b": 1}, arrived={f"d{number}": 1})
    page.shows_step(52)
    heard = page.js("return heard")
    assert 1 <= len(heard) <= 3
    assert all(text.endswith("waiting, 5 of 8 blocks used.") for text in heard), heard


# --- experts ----------------------------------------------------------------------------------


@browser
def test_experts_are_as_dark_as_they_are_chosen(serve: Callable[..., EnginePage]) -> None:
    """Lately, not since the start; and those that several ranks have are marked."""
    loads: dict[str, Any] = {
        "expert_layers": [0, 2],
        "expert_load": [[1000, 0, 0, 0], [0, 0, 0, 0]],
        "expert_copies": [[1, 1, 1, 1], [2, 1, 1, 1]],
        "expert_balancedness": 0.5,
        "num_expert_moves": 0,
    }
    trace = Trace(num_blocks=8, block_size=16)
    run_step(trace, {})
    page = serve(trace, lambda: loads)
    page.watch()

    def caption() -> str:
        return page.text("#engine-experts .experts-scale")

    def colour(layer: int, expert: int) -> tuple[int, ...]:
        (seen,) = page.colours_at("#engine-experts canvas", 24 * expert + 4, 24 * layer + 4)
        return seen

    page.until(lambda: caption() == "2 layers of 4 experts; balance of the ranks 0.50")
    first = colour(0, 0)
    assert first != colour(0, 1) == colour(1, 0)
    loads = loads | {"expert_load": [[1000, 10_000, 0, 0], [7, 0, 0, 0]], "num_expert_moves": 3}
    page.until(lambda: caption().endswith("; 3 moved"))
    assert colour(0, 1) == first == colour(1, 0), "the first expert was not chosen again"
    assert colour(0, 0) != first
    page.js("document.querySelector('#engine-experts canvas').focus()")
    page.type(DOWN)
    words = "Layer 2, expert 0: 7 choices, 100.0% lately, on 2 ranks"
    page.until(lambda: page.text("#engine-expert") == words)
    page.type(UP)
    page.until(lambda: page.text("#engine-expert").startswith("Layer 0, expert 0: 1,000 choices"))
    page.type(DOWN)
    page.type(RIGHT)
    page.until(lambda: page.text("#engine-expert").startswith("Layer 2, expert 1: 0 choices"))


@browser
def test_a_model_without_experts_has_no_map_of_them(serve: Callable[..., EnginePage]) -> None:
    trace = Trace(num_blocks=8, block_size=16)
    page = serve(trace, dict)
    page.watch()
    run_step(trace, {"a": 1}, arrived={"a": 1})
    page.shows_step(0)
    assert page.js("return document.querySelector('#engine-experts').hidden")
