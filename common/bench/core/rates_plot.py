"""Speeds of `ladder` and `compare` as a picture: lines over batch sizes, bars for all else.

The dots are medians and the thin lines reach from the slowest to the fastest round. Batch sizes and
their speeds are drawn on logarithmic scales: where decoding is bound by memory, twice the batch is
twice the speed and a straight line. The grey line is where the measured limits of the machine,
memory's or arithmetic's, would be reached in the number format that it names.
"""

from pathlib import Path
from typing import Any

from common.bench.core.results import Result
from common.bench.costs import DTYPE_BYTES

MARKERS = "osD^vPXp*h<>dH8"


def plot_rates(result: Result, path: Path) -> None:
    """Draw a result's rows into a file; its suffix says what kind. Raises ValueError where that
    cannot be, or where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure

        from common.notebooks.plots import use_style
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must name a .png or an .svg, not {path.name!r}")
    use_style()
    decode = [row for row in result["rows"] if row["kind"] == "decode"]
    bars: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["kind"] != "decode":
            bars.setdefault(row["point"], []).append(row)
    widths = [3.0] * bool(decode) + [2.2] * len(bars)
    if not widths:
        raise ValueError("there is nothing to draw: no engine was measured")
    names = list(dict.fromkeys(label(row) for row in result["rows"]))
    height = max(3.4, 1.6 + 0.34 * len(names))
    figure = Figure(figsize=(2.7 * sum(widths) if len(widths) > 1 else 7.5, height))
    figure.set_layout_engine("constrained")
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    if decode:
        draw_lines(panels.pop(0), decode, names, alone=not bars)
    for panel, rows in zip(panels, bars.values(), strict=True):
        draw_bars(panel, rows, names, named=not decode)
    text = " ".join([caption(result), *limit_in_words(decode)])
    figure.supxlabel(text, fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def label(row: dict[str, Any]) -> str:
    """The row's own label, or the engine's name, with its number format where that is a quantised one."""
    if "label" in row:
        return row["label"]
    return row["engine"] + ("" if row["dtype"] in DTYPE_BYTES else f", {row['dtype']}")


def colors(names: list[str]) -> dict[str, Any]:
    """A colour for each engine: by hand for a few, along a map for many."""
    from matplotlib import colormaps

    from common.notebooks.plots import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

    few = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY]
    many = [colormaps["viridis"](0.85 * i / max(1, len(names) - 1)) for i in range(len(names))]
    return dict(zip(names, few if len(names) <= len(few) else many, strict=False))


def draw_lines(panel: Any, rows: list[dict[str, Any]], names: list[str], alone: bool) -> None:
    """Decode speed over batch size, a line an engine."""
    palette = colors(names)
    for name, marker in zip(names, MARKERS, strict=False):
        own = [row for row in rows if label(row) == name]
        sizes, speeds = [row["batch_size"] for row in own], [row["rate"] for row in own]
        below = [row["rate"] - min(row["rates"]) for row in own]
        above = [max(row["rates"]) - row["rate"] for row in own]
        panel.errorbar(
            sizes, speeds, [below, above], label=name, color=palette[name], marker=marker,
            markersize=5, elinewidth=1,
        )  # fmt: skip
    sizes = sorted({row["batch_size"] for row in rows})
    limit = [speed_limit(rows, size) for size in sizes]
    if all(limit):
        dtype = next(row["dtype"] for row in rows if row["mbu"])
        panel.plot(
            sizes, limit, color="#999999", linestyle="--", linewidth=1, label=f"limit, {dtype}"
        )
    panel.set(xscale="log", yscale="log", title="Decode", xlabel="batch", ylabel="tokens/s")
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()
    plain_ticks(panel)
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if alone else {"loc": "best"}
    panel.legend(fontsize=9, **place)


def speed_limit(rows: list[dict[str, Any]], batch_size: int) -> float | None:
    """Tokens a second at the machine's limits: at 100% of memory or of arithmetic, which is less,
    by the engine that shares the most between its sequences."""
    limits = [
        100 * row["rate"] / max(row["mbu"], row["mfu"])
        for row in rows
        if row["batch_size"] == batch_size and row["mbu"] and row["mfu"]
    ]
    return max(limits, default=None)


def limit_in_words(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence where there are engines that the limit is none for."""
    dtype = next((row["dtype"] for row in rows if row["mbu"]), None)
    if dtype is None or all(row["dtype"] in DTYPE_BYTES for row in rows):
        return []
    return [f"Dashed: the limit of weights and products in {dtype}; other formats may pass it."]


def plain_ticks(panel: Any) -> None:
    """1, 2 and 5 times powers of ten, written out."""
    low, high = panel.get_ylim()
    ticks = [m * 10**power for power in range(7) for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.set_ylim(low, high)


def draw_bars(panel: Any, rows: list[dict[str, Any]], names: list[str], named: bool) -> None:
    """One speed an engine, the first at the top, its number beside it."""
    palette = colors(names)
    places = [names.index(label(row)) for row in rows]
    speeds = [row["rate"] for row in rows]
    panel.barh(places, speeds, height=0.62, color=[palette[label(row)] for row in rows])
    for place, row in zip(places, rows, strict=True):
        panel.hlines(place, min(row["rates"]), max(row["rates"]), color="#222222", linewidth=1)
        text = f" {row['rate']:,.0f}"
        panel.annotate(text, (max(row["rates"]), place), va="center", fontsize=9)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(0, 1.2 * max(max(row["rates"]) for row in rows))
    panel.set(title=rows[0]["point"][:1].upper() + rows[0]["point"][1:], xlabel="tokens/s")
    panel.grid(False, axis="y")


def caption(result: Result) -> str:
    """The machine and the day, in few words, and what thin lines are where there was more than a round."""
    machine = result["machine"]
    name = (
        machine["gpus"][0]["name"] if result["limits"].get("device") == "cuda" else machine["cpu"]
    )
    cores = "" if result["limits"].get("device") == "cuda" else f", {machine['cores']} cores"
    lines = " Thin lines: slowest to fastest round."
    if all(len(row.get("rates", "several")) == 1 for row in result["rows"]):
        lines = ""
    return f"{name}{cores}. {result['date'][:10]}.{lines}"
