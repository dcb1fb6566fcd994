"""Latency distributions of `serve` results as a picture, for those who would rather look."""

from collections.abc import Mapping
from pathlib import Path

from common.bench.core.results import Result

METRICS = ("TTFT", "ITL", "TPOT", "E2E")


def plot_latencies(results: Mapping[str, Result], path: Path) -> None:
    """Cumulative distributions, one panel a metric, one line a result, from stored percentiles.

    Raises ValueError for a result that `serve` did not write, or where matplotlib is missing.
    """
    for name, result in results.items():
        if not isinstance(result.get("quantiles_ms"), dict):
            raise ValueError(f"{name}: no latency distributions to plot; only `serve` writes them")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for panel, metric in zip(panels, METRICS, strict=True):
        for name, result in results.items():
            values = result["quantiles_ms"].get(metric)
            if values:
                panel.plot(values, range(101), label=Path(name).stem)
        panel.set_title(metric)
        panel.set_xlabel("ms")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("% of samples at most this")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
