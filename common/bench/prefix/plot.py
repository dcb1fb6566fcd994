"""The result of `prefix` as a picture: hit rate, time to first token and speed, workload by workload."""

import importlib.util
import statistics
from pathlib import Path
from typing import Any

from common.bench.core.rates_plot import caption, colors
from common.bench.core.results import Result


def check_plot(path: Path, flag: str = "--plot") -> None:
    """Raise ValueError where nothing can be drawn there: before all is measured, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{flag} needs matplotlib: pip install matplotlib")
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{flag} must name a .png or an .svg, not {path.name!r}")


def plot_prefix(result: Result, path: Path) -> None:
    """Draw a result's rows into a file; its suffix says what kind."""
    from matplotlib.figure import Figure

    from common.notebooks.plots import use_style

    workloads: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        workloads.setdefault(row["workload"], []).append(row)
    use_style()
    names = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    figure = Figure(figsize=(1.5 + 2.6 * len(workloads), 1.2 + 3 * (0.6 + 0.26 * len(names))))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(3, len(workloads), squeeze=False)
    for place, (workload, rows) in enumerate(workloads.items()):
        top, middle, bottom = (panels[line][place] for line in range(3))
        draw_hit_rate(top, rows, names)
        draw_ttft(middle, rows, names)
        draw_speed(bottom, rows, names)
        top.set_title(workload[:1].upper() + workload[1:])
        for panel in (top, middle, bottom):
            panel.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.grid(False, axis="y")
            panel.tick_params(labelsize=9)
    figure.supxlabel(caption(result), fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_hit_rate(panel: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    """Beside a dashed line for what a cache that forgets nothing would find."""
    bars(panel, rows, names, [row["hit_rate"] for row in rows])
    panel.axvline(rows[0]["possible"], color="#7F7F7F", linestyle="--", linewidth=1)
    panel.set_xlim(0, 119)
    panel.set_xticks([0, 50, 100])
    panel.set_xlabel("hit rate, %; dashed: possible", fontsize=9)


def draw_ttft(panel: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    """The median; where requests come one at a time, of those after the first."""
    serial = rows[0]["others_ms"] is not None
    values = [row["others_ms"] if serial else row["ttft_ms"] for row in rows]
    whiskers = [
        [statistics.median(ttfts[1:] if serial else ttfts) for ttfts in row["ttfts_ms"]]
        for row in rows
    ]
    bars(panel, rows, names, values, whiskers)
    panel.set_xlabel("TTFT after the first, ms" if serial else "median TTFT, ms", fontsize=9)


def draw_speed(panel: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    values = [row["rate"] for row in rows]
    bars(panel, rows, names, values, [row["rates"] for row in rows])
    panel.set_xlabel("output tokens/s", fontsize=9)


def bars(
    panel: Any,
    rows: list[dict[str, Any]],
    names: list[str],
    values: list[float],
    whiskers: list[list[float]] | None = None,
) -> None:
    """A bar an engine, its number beside it; a thin line from the least to the greatest round."""
    palette = colors(names)
    places = [names.index(row["engine"]) for row in rows]
    panel.barh(places, values, height=0.66, color=[palette[row["engine"]] for row in rows])
    for place, value, ends in zip(places, values, whiskers or [[v] for v in values], strict=True):
        panel.hlines(place, min(ends), max(ends), color="#222222", linewidth=1)
        text = f"{value:,.{1 if 0 < value < 10 else 0}f}"
        panel.annotate(
            text,
            (max(*ends, value), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # hides a line behind it
        )
    most = max(max(values), *(max(ends) for ends in whiskers or [values]))
    panel.set_xlim(0, 1.25 * most if most else 1)
