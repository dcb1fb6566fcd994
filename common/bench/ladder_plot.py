"""The ladder as one picture: a bar a part, by what it adds, with its speed, and its size beside it.

For who sees the project for the first time: what each technique made of the same work, and how much
code the engine had by then. The thin lines reach from the slowest to the fastest round.
"""

from pathlib import Path
from typing import Any

from common.bench.core.processes import ROOT
from common.bench.core.rates_plot import caption
from common.bench.core.results import Result


def titles_and_sizes(parts: list[int]) -> dict[str, tuple[str, int]]:
    """Name of a ladder's entrant -> what the part's README is called, and its lines of code."""
    from common.chapters.chain import ChapterError, count_code_lines, find_parts, front_matter

    found = {}
    for part in find_parts(ROOT):
        if part.number in parts:
            try:
                title = front_matter(part)["title"]
            except (ChapterError, KeyError):
                title = part.folder.name
            files = [name for name in part.read_chain() if name.endswith(".py")]
            size = sum(count_code_lines(part.folder / name) for name in files)
            found[f"part {part.number:02d}"] = (title, size)
    return found


def plot_overview(result: Result, path: Path) -> None:
    """Draw the rows of a ladder's first point; the file's suffix says what kind."""
    from matplotlib.figure import Figure

    from common.notebooks.plots import BLUE, ORANGE, use_style

    point = result["rows"][0]["point"]
    rows = [row for row in result["rows"] if row["point"] == point]
    use_style()
    figure = Figure(figsize=(10, 1.3 + 0.34 * len(rows)))
    figure.set_layout_engine("constrained")
    speeds, sizes = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    draw(speeds, rows, [row["rate"] for row in rows], [BLUE] * (len(rows) - 1) + [ORANGE])
    first = rows[0]["rate"]
    for place, row in enumerate(rows):
        speeds.hlines(place, min(row["rates"]), max(row["rates"]), color="#222222", linewidth=1)
        times = f"   {row['rate'] / first:.1f}x" if place else ""
        write(speeds, place, max(row["rates"]), f"{row['rate']:,.0f}{times}")
    speeds.set_yticks(range(len(rows)), [label(row) for row in rows])
    speeds.set_title(f"Tokens a second: {point}")
    draw(sizes, rows, [row["code_lines"] or 0 for row in rows], ["#999999"] * len(rows))
    for place, row in enumerate(rows):
        write(sizes, place, row["code_lines"] or 0, f"{row['code_lines'] or 0:,}")
    sizes.set_title("Lines of code")
    sizes.tick_params(left=False)
    figure.supxlabel(f"{result['model']}. {caption(result)}", fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def label(row: dict[str, Any]) -> str:
    """`08  Speculative decoding (speculative=ngram)`."""
    title = f"{row['engine'].removeprefix('part ')}  {row['title']}"
    return title + (f"\n{row['with']}" if row["with"] else "")


def draw(panel: Any, rows: list[dict[str, Any]], values: list[float], colors: list[str]) -> None:
    panel.barh(range(len(rows)), values, height=0.66, color=colors)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1.35 * max(*values, 1))
    panel.grid(False, axis="y")
    panel.tick_params(labelsize=9)


def write(panel: Any, place: int, end: float, text: str) -> None:
    """A number behind a bar."""
    panel.annotate(
        text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
    )
