"""The engine's half of the page, for tests: a server around a trace that the test writes, and the page
in the words of who watches it."""

import contextlib
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from common.http import page
from common.http.app import Frontend
from common.http.run import ServerConfig
from common.testing.page.browser import Page
from common.testing.server import serving_thread
from common.trace import Trace


def app_of(trace: Trace, config: ServerConfig, experts: Any = None) -> Any:
    """A server with the page and a trace, and no engine behind it."""
    engine = SimpleNamespace(
        tokenizer=None, max_model_len=64, vocab_size=64, config=SimpleNamespace(model="scripted")
    )
    frontend = Frontend(engine, config, streaming=True, max_n=1)
    frontend.add_trace(trace, experts)
    page.mount(frontend.app)
    return frontend.app


# Read from a copy: reading from a canvas itself would make the browser paint it another way.
PIXELS = """
const pixels = (selector, x, y, size) => {
  const canvas = document.querySelector(selector);
  const copy = new OffscreenCanvas(canvas.width, canvas.height);
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const ratio = devicePixelRatio;
  const part = size ? [x * ratio, y * ratio, size, size] : [0, 0, copy.width, copy.height];
  return context.getImageData(...part).data;
};
"""


class EnginePage(Page):
    """The page in the words of who watches the engine."""

    def watch(self) -> None:
        """Open the page and wait until it follows the trace."""
        self.open()
        self.until(lambda: self.status == "live")

    @property
    def status(self) -> str:
        return self.text("#engine-status")

    @property
    def counts(self) -> dict[str, str]:
        """What is counted -> the count, of those that are shown."""
        return self.js(
            "return Object.fromEntries([...document.querySelectorAll('.counts div')]"
            ".filter((one) => one.checkVisibility())"
            ".map((one) => [one.children[0].textContent, one.children[1].textContent]))"
        )

    @property
    def rows(self) -> list[list[str]]:
        """The cells of the table that are shown."""
        return self.js(
            "return [...document.querySelectorAll('.sequences:not([hidden]) tbody tr')].map((row) =>"
            " [...row.cells].filter((cell) => cell.checkVisibility())"
            ".map((cell) => cell.textContent.trim()))"
        )

    @property
    def step(self) -> list[str]:
        """The step in words, line by line."""
        return self.js(
            "return [...document.querySelectorAll('#engine-step p')].map((p) => p.textContent)"
        )

    def shows_step(self, step: int) -> None:
        self.until(lambda: self.step[0].startswith(f"Step {step} "))

    def shows_rows(self, *rows: str) -> None:
        """Wait for these rows, each in words with a space between cells."""
        wanted = [row.split() for row in rows]
        self.until(lambda: self.rows == wanted)

    def point(self, selector: str, x: float, y: float, kind: str = "pointermove") -> None:
        """Move or click at a place of a canvas, in CSS pixels from its corner."""
        self.js(
            "const canvas = document.querySelector(arguments[0]);"
            "const { left, top } = canvas.getBoundingClientRect();"
            "const [clientX, clientY] = [left + arguments[1], top + arguments[2]];"
            "const Kind = arguments[3] === 'click' ? MouseEvent : PointerEvent;"
            "canvas.dispatchEvent(new Kind(arguments[3], { clientX, clientY, bubbles: true }))",
            selector,
            x,
            y,
            kind,
        )

    def colours_at(self, selector: str, x: float, y: float, size: int = 1) -> set[tuple[int, ...]]:
        """The colours in a square of a canvas; (0, 0, 0, 0) where nothing is painted."""
        data = self.js(f"{PIXELS} return [...pixels(...arguments)]", selector, x, y, size)
        return {tuple(data[i : i + 4]) for i in range(0, len(data), 4)}

    def is_painted(self, selector: str, colour: tuple[int, ...]) -> bool:
        """Whether any point of a canvas has the colour."""
        return self.js(
            f"{PIXELS} const data = pixels(arguments[0]);"
            "for (let at = 0; at < data.length; at += 4)"
            " if (arguments[1].every((value, index) => data[at + index] === value)) return true;"
            "return false",
            selector,
            colour,
        )

    def swatch(self, row: int) -> tuple[int, ...]:
        """The colour of a row of the table, as a canvas paints it."""
        data = self.js(
            "const canvas = new OffscreenCanvas(1, 1).getContext('2d');"
            "const swatch = document.querySelectorAll('tbody .swatch')[arguments[0]];"
            "canvas.fillStyle = getComputedStyle(swatch).color; canvas.fillRect(0, 0, 1, 1);"
            "return [...canvas.getImageData(0, 0, 1, 1).data]",
            row,
        )
        return tuple(data)

    def block(self, number: int, columns: int, size: int) -> tuple[float, float]:
        """Where a cell of the map has its middle."""
        return (number % columns + 0.5) * size - 0.5, (number // columns + 0.5) * size - 0.5


@contextlib.contextmanager
def serving(driver: Any) -> Iterator[Callable[..., EnginePage]]:
    """serve(trace) starts a server and gives the page; afterwards, no complaint in the console."""
    with contextlib.ExitStack() as stack:
        pages = []

        def serve(trace: Trace, experts: Any = None, **config: Any) -> EnginePage:
            server = ServerConfig(port=0, **config)
            url = stack.enter_context(serving_thread(app_of(trace, server, experts), server))
            pages.append(EnginePage(driver, url))
            pages[-1].forget()
            return pages[-1]

        yield serve
        assert pages[0].complaints() == []
        driver.get("about:blank")


def run_step(trace: Trace, scheduled: dict[str, int], **changes: Any) -> None:
    """One step with these tokens; changes: `finished`, `allocated`, … as in a record."""
    with trace.step() as record, trace.phase("forward"):
        record.scheduled = scheduled
        for name, value in changes.items():
            setattr(record, name, value)


def random_trace(seed: int, num_steps: int = 200, capacity: int = 4096) -> Trace:
    """An engine that does at random everything that engines do, also within one step."""
    rng = random.Random(seed)
    trace = Trace(capacity, num_blocks=24, block_size=4)
    free = list(range(24))
    waiting: list[str] = []
    tables: dict[str, list[int]] = {}
    ended: list[str] = []  # computed all the same, with their blocks

    def take(name: str) -> None:
        count = rng.randint(0, min(3, len(free)))
        blocks = [free.pop(rng.randrange(len(free))) for _ in range(count)]
        trace.allocated(name, blocks)
        tables[name] += blocks

    def release(name: str) -> None:
        trace.freed(name, tables[name][::-1])
        own = tables.pop(name)
        kept = {block for table in tables.values() for block in table}
        free.extend(block for block in own if block not in kept)

    for number in range(num_steps):
        for child in range(rng.choice([0, 0, 1, 3])):
            waiting.append(f"request-{number}-{child}")
            trace.arrived(waiting[-1], rng.randint(1, 50))
        if waiting and rng.random() < 0.1:
            trace.finished(waiting.pop(rng.randrange(len(waiting))), "abort")
        with trace.step():
            running = [name for name in tables if name not in ended]
            if running and rng.random() < 0.3:
                name = rng.choice(running)
                release(name)
                waiting.insert(0, name)
                trace.preempted(name)
            while waiting and rng.random() < 0.5:
                name, others = waiting.pop(0), list(tables.values())
                tables[name] = rng.choice(others)[: rng.randint(0, 2)] if others else []
                if rng.random() < 0.5:
                    trace.cached(name, 4 * len(tables[name]))
                trace.allocated(name, list(tables[name]))
                take(name)
                trace.scheduled(name, rng.randint(1, 50))
            for name in list(tables):
                if rng.random() < 0.8:
                    take(name)
                    count = rng.choice([1, 1, 1, 5])
                    trace.scheduled(name, count)
                    if count > 1:
                        trace.rejected(name, rng.randint(1, count - 1))
                if name not in ended and rng.random() < 0.2:
                    trace.finished(name, rng.choice(["stop", "length"]))
                    if rng.random() < 0.5:
                        ended.append(name)
                    else:
                        release(name)
            while ended and rng.random() < 0.3:
                release(ended.pop())
    return trace


def static_batch(trace: Trace) -> None:
    """a and b in a static batch; a ends first, c waits. Blocks are reserved to the end."""
    trace.arrived("a", 20)
    trace.arrived("b", 3)
    run_step(trace, {"a": 20, "b": 3}, allocated={"a": [0, 1, 2], "b": [3, 4]})
    trace.arrived("c", 5)
    run_step(trace, {"a": 1, "b": 1}, finished={"a": "length"})
    run_step(trace, {"a": 1, "b": 1})
