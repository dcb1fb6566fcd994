"""The time to first token of prompts that another worker computed, by what it was spent on."""

import re
import urllib.request

STAGES = ("queue", "prefill", "room", "transfer")  # as the decode worker counts them
LINE = re.compile(r"^kv_transfer:(\w+?)_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


def read_totals(url: str) -> dict[str, float]:
    """How many prompts were fetched, and the seconds of each stage, since the start."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return parse(response.read().decode())


def parse(text: str) -> dict[str, float]:
    """The same from the text of `/metrics`, over all engines in it; empty where none fetches."""
    totals: dict[str, float] = {}
    for name, value in LINE.findall(text):
        name = name.removesuffix("_seconds")
        if name in (*STAGES, "fetched"):
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def split(
    before: dict[str, float], after: dict[str, float], ttft: float
) -> dict[str, float] | None:
    """Mean seconds of each stage between two readings, and of what is left of the mean time to first
    token: the decode worker's own step, and the ways to it and back. None: nothing was fetched."""
    count = after.get("fetched", 0.0) - before.get("fetched", 0.0)
    if not count:
        return None
    means = {name: (after[name] - before[name]) / count for name in STAGES}
    return means | {"decode": ttft - sum(means.values())}
