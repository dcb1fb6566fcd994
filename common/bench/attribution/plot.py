"""The result of `attribution` as a waterfall: from everything down to what is left without each technique.

Each bar hangs from the speed with everything on and ends at the speed without its technique, so its
length is what the technique is worth: to the left what is lost without it, to the right, in red, what is
won. The grey bar is the engine with nothing on.
"""

from pathlib import Path
from typing import Any

from common.bench.attribution.techniques import EVERYTHING, NOTHING
from common.bench.core.rates_plot import caption
from common.bench.core.results import Result

COLUMNS = 3  # panels beside each other


def plot_attribution(result: Result, path: Path) -> None:
    """Draw a result's rows into a file; its suffix says what kind."""
    from matplotlib.figure import Figure

    from common.notebooks.plots import use_style

    workloads: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        workloads.setdefault(row["workload"], []).append(row)
    names = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    use_style()
    across = min(COLUMNS, len(workloads))
    down = -(-len(workloads) // across)
    height = 0.7 + 0.3 * len(names)
    figure = Figure(figsize=(2.2 + 3.4 * across, 0.5 + down * (height + 0.6)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for place, (workload, rows) in enumerate(workloads.items()):
        panel = panels[place // across][place % across]
        draw_workload(panel, rows, names)
        panel.set_title(workload[:1].upper() + workload[1:])
        labels = [name.removeprefix("without ") for name in names]
        panel.set_yticks(range(len(names)), labels if place % across == 0 else [""] * len(names))
    for place in range(len(workloads), down * across):
        panels[place // across][place % across].set_axis_off()
    text = f"Without one technique, all others on. {caption(result)}"
    figure.supxlabel(text, fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_workload(panel: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    """One row an engine, the speed with everything at the top and as a line through all."""
    from common.notebooks.plots import BLUE, ORANGE, RED

    everything = next((row["rate"] for row in rows if row["engine"] == EVERYTHING), None)
    if everything is None:
        return
    most = max(max(row["rates"]) for row in rows)
    panel.axvline(everything, color=BLUE, linewidth=1, alpha=0.5)
    for row in rows:
        place, rate = names.index(row["engine"]), row["rate"]
        if row["engine"] in (EVERYTHING, NOTHING):
            color = BLUE if row["engine"] == EVERYTHING else "#999999"
            panel.barh(place, rate, height=0.62, color=color)
            text, end = f"{rate:,.0f}", max(row["rates"])
        else:
            color = ORANGE if rate <= everything else RED
            panel.barh(place, rate - everything, left=everything, height=0.62, color=color)
            percent = round(100 * (rate / everything - 1))
            text, end = f"{percent:+d}%", max(*row["rates"], everything)
        panel.hlines(place, min(row["rates"]), max(row["rates"]), color="#222222", linewidth=1)
        panel.annotate(
            text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    panel.set_xlim(0, 1.22 * most)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel("output tokens/s", fontsize=9)
    panel.tick_params(labelsize=9)
    panel.grid(False, axis="y")
