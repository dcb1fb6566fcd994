"""The result of `formats` as a picture: what bits buy in quality, and what quality costs in speed.

Left: bits a weight and KL to fp32, both better the smaller; the area of a marker is the weights' memory.
Right: speed at each batch and the same KL. The grey steps are the Pareto front: no format is better in
both. A filled marker computes with float inputs, an open one rounds the inputs too. A KL below 1e-5
stands at the lower edge: such a format says the model's weights again, as the file's own does.
"""

from collections.abc import Callable, Sequence
from math import copysign
from pathlib import Path
from typing import Any

from common.bench.core.rates_plot import caption
from common.bench.core.results import Result
from common.bench.quantized.variants import PLAIN

Row = dict[str, Any]
FLOOR = 1e-5  # of KL, nats a token
RADIUS = 6  # of most markers, in points
OFFSETS = [  # of a label from its marker: points, and where the text begins
    (dx, dy, side)
    for dy in (0, 8, -8, 14, -14, 21, -21, 28, -28, 36, -36)
    for dx, side in ((3, "left"), (-3, "right"), (14, "left"), (-14, "right"))
]


def plot_formats(result: Result, path: Path) -> None:
    """Draw a result's rows into a file; its suffix says what kind. Raises ValueError where no row has a
    KL, or matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from common.notebooks.plots import use_style
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    use_style()
    figure = Figure(figsize=(13, 6.4))
    FigureCanvasAgg(figure)
    draw_formats(figure, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_formats(figure: Any, result: Result) -> None:
    """All panels, on a figure of about 13 x 6.4 inches. Raises ValueError where no row has a KL."""
    rows = [
        row | {"kl": max(row["kl"], FLOOR)}
        for row in result["rows"]
        if row["kl"] is not None and row["variant"] != PLAIN
    ]
    if not rows:
        raise ValueError("there is nothing to draw: no row has a KL (give --quality)")
    plain = next((row for row in result["rows"] if row["variant"] == PLAIN), None)
    sizes = sorted(int(key.removeprefix("rate_")) for key in rows[0] if key.startswith("rate_"))
    figure.set_layout_engine("constrained")
    halves = figure.subfigures(1, 2, width_ratios=[1.05, 1.25])
    left = halves[0].subplots()
    num_rows = -(-len(sizes) // 2)
    grid = halves[1].subplots(num_rows, min(2, len(sizes)), sharey=True, squeeze=False)
    panels = [left, *grid.flat]
    draw_points(left, rows, "bits", lambda row: row["weights_mib"])
    left.set(title="Bits and quality", xlabel="bits a weight, scales included")
    for panel, size in zip(grid.flat, sizes, strict=False):
        draw_points(panel, rows, f"rate_{size}", lambda row: 70.0)
        panel.set(title=f"Speed at batch {size}", xlabel="tokens/s")
        if plain:
            panel.axvline(plain[f"rate_{size}"], color="#999999", linestyle="--", linewidth=1)
            panel.text(
                plain[f"rate_{size}"], 0.99, " fp32", transform=panel.get_xaxis_transform(),
                color="#666666", fontsize=8, va="top",
            )  # fmt: skip
    for panel in (left, *grid[:, 0]):
        panel.set_ylabel("KL to fp32, nats a token")
    fronts = [front(rows, "bits", least=True)]
    fronts += [front(rows, f"rate_{size}", least=False) for size in sizes]
    for panel, members, key in zip(
        panels, fronts, ["bits", *(f"rate_{size}" for size in sizes)], strict=False
    ):
        draw_front(panel, members, key)
    figure.legend(handles=legend(rows), loc="outside upper center", ncols=9, fontsize=9)
    figure.supxlabel(caption_of(result), fontsize=8, color="#666666")
    figure.canvas.draw()  # labels are placed by what is where
    figure.set_layout_engine("none")
    place_labels(left, rows, "bits")
    for panel, members, size in zip(grid.flat, fronts[1:], sizes, strict=False):
        place_labels(panel, members, f"rate_{size}", rows)


def family(row: Row) -> str:
    """What its codes are, in few words: by this it is coloured."""
    name = row["variant"].partition("+")[0]
    families = {"q4_1": "GGUF file", "fp8": "FP8", "fp4": "FP4", "nf4": "NF4", "int8": "INT8"}
    return next((families[key] for key in families if key in name), "INT4")


def palette() -> dict[str, str]:
    from common.notebooks.plots import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

    return {
        "INT8": BLUE, "INT4": ORANGE, "FP8": GREEN, "FP4": PURPLE, "NF4": RED, "GGUF file": SKY,
    }  # fmt: skip


def rounds_inputs(row: Row) -> bool:
    return "activations=" in row["settings"]


def draw_points(panel: Any, rows: Sequence[Row], key: str, area: Callable[[Row], float]) -> None:
    colors = palette()
    for row in sorted(rows, key=area, reverse=True):
        color = colors[family(row)]
        face = "white" if rounds_inputs(row) else color
        panel.scatter(
            row[key], row["kl"], s=area(row), facecolor=face, edgecolor=color, linewidth=1.6,
            alpha=0.85, zorder=3,
        )  # fmt: skip
    panel.set_yscale("log")
    panel.margins(x=0.14, y=0.12)


def front(rows: Sequence[Row], key: str, least: bool) -> list[Row]:
    """Those that no other is better than in both: the key (the least, or the most) and KL."""
    sign = 1 if least else -1

    def beaten(row: Row) -> bool:
        return any(
            sign * other[key] <= sign * row[key]
            and other["kl"] <= row["kl"]
            and (other[key], other["kl"]) != (row[key], row["kl"])
            for other in rows
        )

    return sorted((row for row in rows if not beaten(row)), key=lambda row: row[key])


def draw_front(panel: Any, members: Sequence[Row], key: str) -> None:
    where = "post" if key == "bits" else "pre"
    x, y = [row[key] for row in members], [row["kl"] for row in members]
    panel.step(x, y, where=where, color="#AAAAAA", linewidth=1.2, zorder=2)


def place_labels(
    panel: Any, rows: Sequence[Row], key: str, all_rows: Sequence[Row] | None = None
) -> None:
    """A name beside each point, where no other name and no point is; a line leads to it if need be."""
    from matplotlib.transforms import Bbox

    figure = panel.get_figure(root=True)
    renderer = figure.canvas.get_renderer()
    radius = RADIUS * figure.dpi / 72  # in pixels
    markers = [
        Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius)
        for x, y in (panel.transData.transform((row[key], row["kl"])) for row in all_rows or rows)
    ]
    bounds = panel.get_window_extent(renderer)
    taken: list[Any] = []
    for row in sorted(rows, key=lambda row: row["kl"], reverse=True):
        text = None
        for dx, dy, side in OFFSETS:
            if text is not None:
                text.remove()
            arrow = (
                {"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.7} if abs(dy) > 8 else None
            )
            text = panel.annotate(
                row["variant"], (row[key], row["kl"]), (dx + copysign(RADIUS, dx), dy), textcoords="offset points",
                ha=side, va="center", fontsize=8.5, arrowprops=arrow, zorder=4,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            inside = bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0
            if inside and not any(box.overlaps(other) for other in [*taken, *markers]):
                break
        taken.append(text.get_window_extent(renderer))


def legend(rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(label: str, color: str, face: str) -> Any:
        return Line2D(
            [], [], marker="o", linestyle="", markersize=8, markeredgewidth=1.6, label=label,
            markeredgecolor=color, markerfacecolor=face,
        )  # fmt: skip

    shown = {family(row) for row in rows}
    handles = [mark(name, color, color) for name, color in palette().items() if name in shown]
    if any(rounds_inputs(row) for row in rows):
        handles.append(mark("inputs rounded too", "#666666", "white"))
    handles.append(Line2D([], [], color="#AAAAAA", label="Pareto front"))
    return handles


def caption_of(result: Result) -> str:
    return (
        caption(result).split(" Thin lines")[0] + " Area of a marker, left: memory of the weights."
    )
