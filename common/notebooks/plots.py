"""What the notebooks share to show things: one look for their pictures, tables, and verdicts.

A picture has a white ground of its own, so that it reads the same on a light and on a dark page.
The colours are Okabe and Ito's (2008), which colour-blind readers can tell apart.
"""

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F"
WIDTH = 96  # characters of a printed line


def use_style() -> None:
    """Set matplotlib's defaults for the notebook."""
    plt.rcParams.update(
        {
            "figure.figsize": (8.5, 3.8),
            "figure.dpi": 90,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.8,
            "legend.frameon": False,
            "font.size": 10.5,
            "text.color": "#222222",
        }
    )


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """What is seen, and what the axes are, with their units."""
    axes.set(title=title, xlabel=x, ylabel=y)


def legend(axes: Axes) -> None:
    """A legend at the right of the axes, where no data can be."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


def timeline(
    axes: Axes, spans: Iterable[tuple[str, str, float, float]], colors: dict[str, str]
) -> None:
    """Draw (row, kind, begin, end) spans as bars on one line a row, rows from the top down."""
    rows: dict[str, int] = {}
    shown: set[str] = set()
    for row, kind, begin, end in spans:
        y = rows.setdefault(row, len(rows))
        name = None if kind in shown else kind
        shown.add(kind)
        axes.barh(y, end - begin, left=begin, height=0.6, color=colors[kind], label=name)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")


class Table:
    """Rows under headings; a notebook shows it as a table, `print` as aligned columns."""

    def __init__(self, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self.headings = list(headings)
        self.rows = [[str(cell) for cell in row] for row in rows]

    def _repr_html_(self) -> str:
        def line(tag: str, cells: list[str]) -> str:
            marked = (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{''.join(marked)}</tr>"

        lines = [line("th", self.headings), *(line("td", row) for row in self.rows)]
        return "<table>\n" + "\n".join(lines) + "\n</table>"

    def __repr__(self) -> str:
        columns = zip(self.headings, *self.rows, strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (self.headings, *self.rows)
        ]
        return "\n".join(lines)


def say(text: str) -> None:
    """Print a paragraph in lines that fit a page."""
    print(textwrap.fill(" ".join(text.split()), WIDTH))


def verdict(prediction: str, measured: str, holds: bool) -> None:
    """Print what was expected beside what was seen, and whether they agree."""
    say(f"Predicted: {prediction}")
    say(f"Measured:  {measured}")
    print("The prediction holds." if holds else "The prediction does NOT hold here.")
