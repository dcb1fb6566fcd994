"""The results of `parallel` as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.bench.core.rates_plot import caption, colors
from common.bench.core.results import Result


def plot_collectives(result: Result, path: Path) -> None:
    """A panel a number of ranks and collective: measured times, and the fitted line."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["operation"] for row in rows))
    sizes = sorted({row["ranks"] for row in rows})
    shown = [(ranks, name) for ranks in sizes for name in names]
    columns = min(3, len(names))
    lines = -(-len(shown) // columns)
    figure = new_figure((3.2 * columns + 0.6, 2.4 * lines + 0.5))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    palette = colors(list(dict.fromkeys(row["transport"] for row in rows)))
    for panel, (ranks, name) in zip(grid.flat, shown, strict=False):
        own = [row for row in rows if (row["ranks"], row["operation"]) == (ranks, name)]
        draw_fits(panel, own, palette)
        panel.set_title(name if len(sizes) == 1 else f"{name}, {ranks} ranks", fontsize=10)
    for panel in grid[:, 0]:
        panel.set_ylabel("microseconds")
    for panel in grid[-1]:
        panel.set_xlabel("bytes")
        ticks = rows[0]["sizes"][::2]
        panel.set_xticks(ticks, [bytes_text(size) for size in ticks], fontsize=8)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    text = caption(result).partition(" Thin lines")[0]
    figure.supxlabel(f"{text} Lines: alpha + beta · bytes.", fontsize=8, color="#666666")
    save(figure, path)


def draw_fits(panel: Any, rows: Sequence[dict[str, Any]], palette: dict[str, Any]) -> None:
    for row in rows:
        color, x = palette[row["transport"]], np.geomspace(min(row["sizes"]), max(row["sizes"]), 99)
        panel.plot(x, 1e6 * (row["alpha_s"] + row["beta_s"] * x), color=color, linewidth=1)
        times = [1e6 * seconds for seconds in row["times_s"]]
        panel.plot(row["sizes"], times, "o", color=color, markersize=4, label=row["transport"])
    panel.set_xscale("log", base=4)
    panel.set_yscale("log")


def plot_engines(result: Result, path: Path) -> None:
    """Speeds to one engine's, by batch; a mark where the cost model has put them."""
    rows, names = result["rows"], list(dict.fromkeys(row["engine"] for row in result["rows"]))
    kinds = [kind for kind in (True, False) if any(row["decodes"] is kind for row in rows)]
    counts = [len({row["point"] for row in rows if row["decodes"] is kind}) for kind in kinds]
    figure = new_figure((1.6 + 1.5 * sum(counts), 3.6))
    panels = figure.subplots(1, len(kinds), squeeze=False, width_ratios=counts, sharey=True)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        draw_speeds(panel, [row for row in rows if row["decodes"] is kind], names)
        panel.set_title("Decode" if kind else "Prefill")
    panels[0].set_ylabel(f"speed, to {names[0]}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=5)
    figure.supxlabel(caption(result), fontsize=8, color="#666666")
    save(figure, path)


def draw_speeds(panel: Any, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    points = list(dict.fromkeys(row["point"] for row in rows))
    first = {row["point"]: row for row in rows if row["engine"] == names[0]}
    palette, width = colors(list(names)), 0.8 / max(1, len(names) - 1)
    marked = False
    for place, name in enumerate(names[1:]):
        for row in rows:
            if row["engine"] != name or row["ratio"] is None:
                continue
            x = points.index(row["point"]) + (place + 0.5) * width - 0.4
            label = name if row["point"] == points[0] else None
            panel.bar(x, row["ratio"], width=0.9 * width, color=palette[name], label=label)
            theirs = first[row["point"]]
            ends = [a / b for a, b in zip(row["rates"], theirs["rates"], strict=False)]
            panel.vlines(x, min(ends), max(ends), color="#222222", linewidth=1)
            panel.annotate(f"{row['ratio']:.2f}", (x, max(ends)), (0, 3), ha="center",
                           textcoords="offset points", fontsize=8)  # fmt: skip
            if row["predicted_ms"] is not None:
                guess = theirs["predicted_ms"] / row["predicted_ms"]
                panel.plot(x, guess, "D", color="#222222", markerfacecolor="white", markersize=6,
                           label=None if marked else "predicted")  # fmt: skip
                marked = True
    panel.axhline(1, color="#222222", linewidth=1, linestyle="--")
    panel.set_xticks(range(len(points)), [point.partition(", ")[2] for point in points])
    panel.grid(False, axis="x")
    panel.set_ylim(bottom=0)
    panel.margins(y=0.12)


def plot_layouts(result: Result, path: Path) -> None:
    """A panel a machine; a cell a model and a number of sequences, with the layout that wins."""
    machines = list(dict.fromkeys(row["machine"] for row in result["rows"]))
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure = new_figure((12.5, 0.9 + 0.62 * len(models) * len(machines)))
    panels = figure.subplots(len(machines), 1, squeeze=False)[:, 0]
    for panel, machine in zip(panels, machines, strict=True):
        draw_winners(panel, [row for row in result["rows"] if row["machine"] == machine], models)
        panel.set_title(machine, fontsize=11)
    panels[-1].set_xlabel("sequences that run at once")
    figure.supxlabel(
        "Shortest decode step by the cost model. Blue: tensor parallel, the darker the more ranks."
        " Orange: experts spread. *: another layout may win if a number of the machine is 1.5 times"
        " as high or low.",
        fontsize=8,
        color="#666666",
    )
    save(figure, path)


def draw_winners(panel: Any, rows: Sequence[dict[str, Any]], models: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    counts = sorted({row["num_sequences"] for row in rows})
    for row in rows:
        x, y = counts.index(row["num_sequences"]), models.index(row["model"])
        color, text = "#F2F2F2", "no layout has room"
        if row["step_ms"] is not None:
            depth = 0.15 + 0.13 * (row["tp"].bit_length() - 1)
            color = colormaps["Oranges" if row["ep_size"] else "Blues"](depth)
            speed = f"{row['step_ms']:.1f} ms, {short(row['rate'])} tok/s"
            text = f"{row['best']}{'' if row['sure'] else ' *'}\n{speed}"
        panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white"))
        panel.text(x, y, text, ha="center", va="center", fontsize=8)
    panel.set_xlim(-0.5, len(counts) - 0.5)
    panel.set_ylim(len(models) - 0.5, -0.5)
    panel.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    panel.set_yticks(range(len(models)), models)
    panel.grid(False)


def bytes_text(number: int) -> str:
    """1048576 -> 1 Mi."""
    for size, name in ((1 << 20, " Mi"), (1 << 10, " Ki")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)


def short(number: float) -> str:
    """1234567 -> 1.2 M."""
    for size, name in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.{1 if number < 10 * size else 0}f}{name}"
    return f"{number:.0f}"


def new_figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    from common.notebooks.plots import use_style

    use_style()
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained")
    return figure


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
