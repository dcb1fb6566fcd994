"""The time to first token of disaggregated requests, by what it was spent on, as metrics tell it."""

import re
import urllib.request

STAGES = ("queue", "prefill", "transfer", "decode")
LINE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$")
METRIC = "vllm:time_to_first_token_part_seconds"


def split_of(url: str) -> dict[str, float] | None:
    """Mean seconds of each stage since the start; None where the server does not say."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return parse(response.read().decode())


def parse(text: str) -> dict[str, float] | None:
    """The same from the text of `/metrics`, over all engines in it."""
    sums: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    counts: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for line in text.splitlines():
        match = LINE.match(line)
        if not match or not match["name"].startswith(METRIC):
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"] or ""))
        kind = match["name"].removeprefix(METRIC)
        if labels.get("stage") in sums and kind in ("_sum", "_count"):
            (sums if kind == "_sum" else counts)[labels["stage"]] += float(match["value"])
    if not any(counts.values()):
        return None
    return {stage: sums[stage] / counts[stage] for stage in STAGES if counts[stage]}
