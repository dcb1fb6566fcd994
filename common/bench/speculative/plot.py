"""The result of `speculative` as a picture: how many times faster, over the batch."""

import itertools
from pathlib import Path
from typing import Any

from common.bench.core.rates_plot import caption, colors
from common.bench.core.results import Result


def plot_speculative(result: Result, path: Path) -> None:
    """Draw a result's rows into a file; its suffix says what kind.

    A panel a workload and a bar a variant. Bars are ratios to the first variant; where there are
    none, they are speeds.
    """
    from matplotlib.figure import Figure

    from common.notebooks.plots import use_style

    use_style()
    names = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    workloads = list(dict.fromkeys(row["workload"] for row in result["rows"]))
    key = "ratio" if any(row["ratio"] is not None for row in result["rows"]) else "rate"
    shown = names[1:] if key == "ratio" else names
    num_batches = len({row["batch_size"] for row in result["rows"]})
    width = max(3.4, 0.8 + 0.36 * num_batches * (1 + len(shown)))
    figure = Figure(figsize=(0.6 + width * len(workloads), 3.8))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for panel, workload in zip(panels, workloads, strict=True):
        rows = [row for row in result["rows"] if row["workload"] == workload]
        draw_panel(panel, rows, key, shown, colors(names))
        panel.set_title(workload[:1].upper() + workload[1:])
    panels[0].set_ylabel(f"times as fast as {names[0]}" if key == "ratio" else "tokens/s")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=9)
    figure.supxlabel(caption(result), fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_panel(
    panel: Any, rows: list[dict[str, Any]], key: str, shown: list[str], palette: dict[str, Any]
) -> None:
    """Bars side by side at each batch, their numbers above; a thin line from the least to the
    greatest round."""
    sizes = sorted({row["batch_size"] for row in rows})
    width = 0.8 / len(shown)
    for place, name in enumerate(shown):
        own = [row for row in rows if row["engine"] == name and row[key] is not None]
        middles = [sizes.index(r["batch_size"]) + (place + 0.5) * width - 0.4 for r in own]
        heights = [row[key] for row in own]
        panel.bar(middles, heights, width=0.92 * width, color=palette[name], label=name)
        for middle, row in zip(middles, own, strict=True):
            ends = row[f"{key}s"]
            panel.vlines(middle, min(ends), max(ends), color="#222222", linewidth=1)
            text = f"{row[key]:,.{2 if key == 'ratio' else 0}f}"
            top = max(*ends, 1.0) if key == "ratio" else max(ends)  # clear of the line at 1
            panel.annotate(
                text, (middle, top), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    if key == "ratio":
        panel.axhline(1, color="#222222", linewidth=1, linestyle="--")
    tops = itertools.chain.from_iterable(row[f"{key}s"] for row in rows)
    panel.set_ylim(0, 1.12 * max(tops, default=1.0))
    panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    panel.set_xlabel("batch")
    panel.grid(False, axis="x")
