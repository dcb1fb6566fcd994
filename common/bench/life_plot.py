"""The picture of `life`: all of it, the way into the engine, and one later token's way out of it.

A bar is a stage, on the track of who does it; the second and third panel look closely at a part of the first.
"""

from pathlib import Path
from typing import Any

from common.bench.core.rates_plot import caption
from common.bench.core.results import Result
from common.bench.life import Life, Span

TRACKS = ("client", "HTTP", "engine", "device")


def plot_life(life: Life, result: Result, path: Path) -> None:
    """Draw it into a file; its suffix says what kind."""
    from matplotlib.figure import Figure

    from common.notebooks.plots import use_style

    use_style()
    figure = Figure(figsize=(11, 8.6))
    figure.set_layout_engine("constrained")
    whole, start, token = figure.subplots(3, 1)
    marks = dict(life.marks)
    before = {name: marks.pop(name) for name in ("arrives", "tokenised", "submitted")}
    draw(whole, life, 0, life.marks["last byte"], "The whole life", marks)
    draw(start, life, 0, 1.15 * before["submitted"], "Until the engine has it", before)
    middle = life.tokens[len(life.tokens) // 2]
    length = middle["sent"] - middle["step"]
    begin, end = middle["step"] - length, middle["sent"] + 0.6 * length
    draw(token, life, begin, end, "One later token's way out", {})
    text = caption(result).removesuffix(" Thin lines: slowest to fastest round.")
    figure.supxlabel(text, fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def colors() -> dict[str, str]:
    from common.notebooks.plots import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

    return {
        "connect": "#BBBBBB", "send": "#BBBBBB", "wait": "#E5E5E5", "stream": "#CFCFCF",
        "socket to handler": "#BBBBBB", "read and check JSON": SKY, "template and tokenise": BLUE,
        "hand over": PURPLE, "queue": "#F0D9A8", "prefill": ORANGE, "decode": GREEN,
        "to the event loop": PURPLE, "detokenise": BLUE, "JSON, SSE, send": RED,
    }  # fmt: skip


def draw(
    panel: Any, life: Life, begin: float, end: float, title: str, marks: dict[str, float]
) -> None:
    """The spans between two times, in milliseconds from the client's begin, and the marks' names."""
    palette, places = colors(), {track: place for place, track in enumerate(TRACKS)}
    written: dict[tuple[int, int], float] = {}  # (track, side) -> where the last name there ends
    for span in life.spans:
        if span.end < begin or span.begin > end:
            continue
        left, right = max(span.begin, begin), min(span.end, end)
        color = palette[span.name.split(":")[0]]
        panel.barh(
            places[span.track], 1000 * (right - left), left=1000 * left, height=0.6, color=color,
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        write_name(panel, span, (left, right), places[span.track], end - begin, written)
    write_marks(panel, marks, end - begin)
    panel.set_yticks(range(len(TRACKS)), TRACKS)
    panel.set_ylim(len(TRACKS) - 0.5, -0.5)
    panel.set_xlim(1000 * begin, 1000 * end)
    panel.set_title(title, pad=26 if marks else 6)
    panel.set_xlabel("ms since the client began", fontsize=9)
    panel.grid(False, axis="y")


def write_marks(panel: Any, marks: dict[str, float], width: float) -> None:
    """Moments, as lines with their names above; one that is too near to the last stands higher."""
    last, height = -width, 0
    for name, moment in sorted(marks.items(), key=lambda mark: mark[1]):
        height = 1 - height if moment - last < 0.09 * width else 0
        last = moment
        panel.axvline(1000 * moment, color="#222222", linewidth=0.8, linestyle=":")
        panel.annotate(
            f"{name}\n{1000 * moment:,.1f} ms", (1000 * moment, -0.55), fontsize=7.5, ha="center",
            xytext=(0, 22 * height), textcoords="offset points", va="bottom", annotation_clip=False,
        )  # fmt: skip


def write_name(
    panel: Any,
    span: Span,
    ends: tuple[float, float],
    place: int,
    width: float,
    written: dict[tuple[int, int], float],
) -> None:
    """The span's name: in it where it fits, else below or above it, where nothing has been written yet."""
    (left, right), text = ends, span.name
    middle, size = (left + right) / 2, 0.0095 * len(text) * width  # of the text, about
    side, align = 0, "center"
    if right - left <= size:
        free = [s for s in (1, -1) if middle - size / 2 >= written.get((place, s), -width)]
        if not free or right - left < 0.002 * width or text == "decode":
            return
        side = free[0]
        align = "top" if side > 0 else "bottom"
        written[place, side] = middle + size / 2
    panel.annotate(
        text, (1000 * middle, place + 0.31 * side), fontsize=7.5, ha="center", va=align,
        annotation_clip=True,
    )  # fmt: skip
