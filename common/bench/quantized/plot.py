"""The result of `formats` as a picture: what bits buy in quality, and what quality costs in speed.

Left: bits a weight and KL to fp32, both better the smaller. Right: speed at each batch and the same KL.
A dot computes with float inputs, a ring rounds the inputs too, so that both can be seen where they
coincide. The grey steps are the Pareto front of formats that a model was rounded to: none of them is
better in both. A checkpoint that was quantised before is drawn, but has no part in the front: its codes
may be what "fp32" was made from. A KL below 1e-5 stands at the lower edge.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.bench.core.rates_plot import caption
from common.bench.core.results import Result
from common.bench.quantized.variants import PLAIN

Row = dict[str, Any]
FLOOR = 1e-5  # of KL, nats a token
DOT, RING = 45.0, 120.0  # areas of markers, in square points
RADIUS = 6.5  # of a ring, in points
SIDES = [  # of a label's near end from its marker, in points, and where the text begins
    (8, "left"), (-8, "right"), (0, "center"), (24, "left"), (-24, "right"), (44, "left"),
    (-44, "right"),
]  # fmt: skip
HEIGHTS = (0, 9, -9, 16, -16, 24, -24, 32, -32, 42, -42, 54, -54)
OFFSETS = [(dx, dy, side) for dy in HEIGHTS for dx, side in SIDES if dx or abs(dy) > 9]


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
    halves = figure.subfigures(1, 2, width_ratios=[0.85, 1.45])
    left = halves[0].subplots()
    num_rows = -(-len(sizes) // 2)
    grid = halves[1].subplots(num_rows, min(2, len(sizes)), sharey=True, squeeze=False)
    draw_points(left, rows, "bits")
    left.set(title="Bits and quality", xlabel="bits a weight, scales included")
    for panel, size in zip(grid.flat, sizes, strict=False):
        draw_points(panel, rows, f"rate_{size}")
        panel.set(title=f"Speed at batch {size}", xlabel="tokens/s")
        if plain:
            panel.axvline(plain[f"rate_{size}"], color="#999999", linestyle="--", linewidth=1)
            panel.text(
                plain[f"rate_{size}"], 0.99, " fp32", transform=panel.get_xaxis_transform(),
                color="#666666", fontsize=8, va="top",
            )  # fmt: skip
    for panel in (left, *grid[:, 0]):
        panel.set_ylabel("KL to fp32, nats a token")
    keys = ["bits", *(f"rate_{size}" for size in sizes)]
    panels = dict(zip(keys, [left, *grid.flat], strict=False))
    for key, panel in panels.items():
        draw_front(panel, rows, key)
    figure.legend(handles=legend(rows), loc="outside upper center", ncols=9, fontsize=9)
    text = caption(result).partition(" Thin lines")[0]
    figure.supxlabel(text, fontsize=8, color="#666666")
    figure.canvas.draw()  # labels are placed by what is where
    figure.set_layout_engine("none")
    for key, panel in panels.items():
        place_labels(panel, rows, key)


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


def is_checkpoint(row: Row) -> bool:
    return "model=" in row["settings"]


def draw_points(panel: Any, rows: Sequence[Row], key: str) -> None:
    colors = palette()
    for row in rows:
        color, is_ring = colors[family(row)], rounds_inputs(row)
        panel.scatter(
            row[key], row["kl"], s=RING if is_ring else DOT, facecolor="none" if is_ring else color,
            edgecolor=color, linewidth=1.6, zorder=3,
        )  # fmt: skip
    panel.set_yscale("log")
    panel.margins(x=0.25 if key == "bits" else 0.42, y=0.14)  # names stand there


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


def draw_front(panel: Any, rows: Sequence[Row], key: str) -> None:
    is_bits = key == "bits"
    members = front([row for row in rows if not is_checkpoint(row)], key, least=is_bits)
    x, y = [row[key] for row in members], [row["kl"] for row in members]
    where = "post" if is_bits else "pre"
    panel.step(x, y, where=where, color="#AAAAAA", linewidth=1.2, zorder=2)


def place_labels(panel: Any, rows: Sequence[Row], key: str) -> None:
    """A name beside each point, where no other name and no point is; a line leads to it if need be."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = panel.get_figure(root=True)
    renderer = figure.canvas.get_renderer()
    radius = RADIUS * figure.dpi / 72  # in pixels
    points = [panel.transData.transform((row[key], row["kl"])) for row in rows]
    taken = [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in points]
    taken += [text.get_window_extent(renderer) for text in panel.texts]
    bounds = panel.get_window_extent(renderer)
    right = bounds.x1 + radius  # there is room between panels
    for row in sorted(rows, key=lambda row: row["kl"], reverse=True):
        best = None
        for dx, dy, side in OFFSETS:
            arrow = {
                "arrowstyle": "-",
                "color": "#AAAAAA",
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": RADIUS,
            }
            text = panel.annotate(
                row["variant"], (row[key], row["kl"]), (dx, dy), textcoords="offset points", ha=side,
                va="center", fontsize=8.5, zorder=4, arrowprops=arrow if max(abs(dx), abs(dy)) > 9 else None,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without its line
            outside = not (bounds.x0 <= box.x0 and box.x1 <= right and bounds.y0 <= box.y0)
            covered = sum(box.overlaps(other) for other in taken) + 10 * outside
            if best is None or covered < best[0]:
                if best is not None:
                    best[1].remove()
                best = covered, text
            else:
                text.remove()
            if covered == 0:
                break
        assert best is not None, "OFFSETS is empty"
        taken.append(Text.get_window_extent(best[1], renderer))


def legend(rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(label: str, color: str, face: str, area: float) -> Any:
        return Line2D(
            [], [], marker="o", linestyle="", markersize=area**0.5, markeredgewidth=1.6, label=label,
            markeredgecolor=color, markerfacecolor=face,
        )  # fmt: skip

    shown = {family(row) for row in rows}
    handles = [mark(name, color, color, DOT) for name, color in palette().items() if name in shown]
    if any(rounds_inputs(row) for row in rows):
        handles.append(mark("inputs rounded too", "#666666", "none", RING))
    front_of = " (without checkpoints)" if any(is_checkpoint(row) for row in rows) else ""
    handles.append(Line2D([], [], color="#AAAAAA", label=f"Pareto front{front_of}"))
    return handles
