"""Which techniques of part 15 run together: one table for the README and for the test that walks it.

A pair runs, or is refused with a reason, or its two techniques are two ways of doing one thing. What is
listed as refused must be, with just these words, and all else must give the right tokens
(`tests/test_part15_matrix.py`). `python -m common.testing.compositions` writes the README's table.
"""

import re
import sys
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from common.testing.parts import folder_of

PART = 15
LLAMA, MOE = "random:tiny-llama", "random:tiny-qwen3-moe"
FOLDER = "FOLDER"  # stands for a new one
OPENING, CLOSING = "<!-- compositions -->", "<!-- /compositions -->"


@dataclass(frozen=True)
class Technique:
    """A row of the table.

    flags: the engine's. params: what every request asks for. counter: of the engine's `stats`, what
    is above 0 when it has done something. is_exact: sums in another order give the same tokens; where
    numbers are rounded on the way that is not certain.
    """

    name: str
    flags: dict[str, Any]
    counter: str | None = None
    model: str = LLAMA
    params: dict[str, Any] = field(default_factory=dict)
    is_exact: bool = True
    has_choices: bool = False  # several completions of a prompt


TECHNIQUES = (
    Technique("two steps in flight", {"async_scheduling": True}),
    Technique("whole prompts", {"enable_chunked_prefill": False}),
    Technique("static batches", {"continuous_batching": False}),
    Technique("hash prefix cache", {"prefix_cache": "hash"}, "num_prefix_cache_hits"),
    Technique("radix prefix cache", {"prefix_cache": "radix"}, "num_prefix_cache_hits"),
    Technique("no prefix cache", {"prefix_cache": "off"}),
    Technique(
        "n-gram drafts", {"speculative": "ngram", "prompt_lookup_min": 1}, "num_draft_tokens"
    ),
    Technique("draft model", {"speculative": "draft", "draft_model": LLAMA}, "num_accepted_tokens"),
    Technique("self-speculation", {"speculative": "self"}, "num_accepted_tokens"),
    Technique("swap", {"offload": "swap"}, "num_swapped_tokens"),
    Technique("prefixes on the host", {"offload": "prefix"}, "num_host_hits"),
    Technique(
        "prefixes on disk",
        {"offload": "both", "disk_kv": FOLDER, "host_kv_memory": 37_000},
        "disk_num_written",
    ),
    Technique("int4 weights", {"quantization": "int4"}),
    Technique(
        "int8 weights and inputs",
        {"quantization": "int8", "activations": "int8"},
        is_exact=False,
    ),
    Technique("int8 keys and values", {"kv_cache_dtype": "int8"}, is_exact=False),
    Technique("tensor parallel", {"tensor_parallel_size": 2}, "num_bytes_sent"),
    Technique(
        "expert parallel",
        {
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "eplb": True,
            "eplb_interval": 5,
        },
        "num_bytes_sent",
        MOE,
    ),
    Technique("pipeline parallel", {"pipeline_parallel_size": 2}),
    Technique("disaggregated", {"role": "decode"}, "num_kv_fetched"),
    Technique("captured steps", {"enforce_eager": False}, "num_graph_replays"),
    Technique("n completions", {}, has_choices=True),
    Technique("prompt_logprobs", {}, params={"prompt_logprobs": 2}),
)
NAMED = {technique.name: technique for technique in TECHNIQUES}

DRAFTING = ("n-gram drafts", "draft model", "self-speculation")
# (any of these, with any of those, and why not); {a flag} is its value.
REFUSED = (
    (
        ("two steps in flight",),
        DRAFTING,
        "async_scheduling is on: speculative {speculative} drafts from the last step's tokens, so one"
        " step is in flight",
    ),
    (
        ("no prefix cache",),
        ("prefixes on the host", "prefixes on disk"),
        "offload is {offload}: prefix_cache must not be off",
    ),
    (
        ("prefixes on disk",),
        ("tensor parallel", "expert parallel"),
        "tensor_parallel_size is 2: disk_kv is for one rank",
    ),
    (
        ("prefixes on disk",),
        ("pipeline parallel",),
        "pipeline_parallel_size is 2: disk_kv is for one rank",
    ),
    (
        ("pipeline parallel",),
        ("draft model", "self-speculation"),
        "pipeline_parallel_size is 2: speculative {speculative} runs all layers on each rank",
    ),
    (
        ("disaggregated",),
        ("pipeline parallel",),
        "pipeline_parallel_size is 2: role decode is for one rank",
    ),
    (
        ("disaggregated",),
        ("tensor parallel", "expert parallel"),
        "tensor_parallel_size is 2: role decode is for one rank",
    ),
    (
        ("disaggregated",),
        ("swap", "prefixes on the host", "prefixes on disk"),
        "offload is {offload}: role decode has no host tier",
    ),
)

# Three that must hold together: each has broken some engine (KV pools that never empty, the KV of
# somebody else after a cancelled request, placeholders of preempted sequences).
TRIPLES = (
    ("swap", "n-gram drafts", "radix prefix cache"),
    ("swap", "draft model", "hash prefix cache"),
    ("prefixes on disk", "self-speculation", "radix prefix cache"),
    ("two steps in flight", "swap", "static batches"),
    ("two steps in flight", "prefixes on disk", "int8 keys and values"),
    ("two steps in flight", "disaggregated", "radix prefix cache"),
    ("disaggregated", "draft model", "int4 weights"),
    ("tensor parallel", "prefixes on the host", "n-gram drafts"),
    ("tensor parallel", "draft model", "int4 weights"),
    ("expert parallel", "swap", "self-speculation"),
    ("expert parallel", "int4 weights", "two steps in flight"),
    ("pipeline parallel", "swap", "n-gram drafts"),
    ("whole prompts", "prefixes on the host", "draft model"),
    ("whole prompts", "two steps in flight", "disaggregated"),
    ("int4 weights", "int8 keys and values", "swap"),
    ("prompt_logprobs", "n completions", "n-gram drafts"),
)


def are_alternatives(a: Technique, b: Technique) -> bool:
    """Whether two techniques want one flag to be different things. (Offloads add up.)"""
    shared = (a.flags.keys() & b.flags.keys()) - {"offload"}
    return any(a.flags[name] != b.flags[name] for name in shared)


def flags_of(*techniques: Technique) -> dict[str, Any]:
    """What an engine with all of them is given."""
    flags = {name: value for t in techniques for name, value in t.flags.items()}
    if len({t.flags["offload"] for t in techniques if "offload" in t.flags}) > 1:
        flags["offload"] = "both"
    return flags


def refusal(*techniques: Technique) -> str | None:
    """Why they are refused, with {a flag} where its value stands; None where they are not."""
    names = {technique.name for technique in techniques}
    for some, others, reason in REFUSED:
        if names & set(some) and names & set(others):
            return reason
    return None


def pairs() -> list[tuple[Technique, Technique]]:
    """All that are no alternatives of each other."""
    return [(a, b) for a, b in combinations(TECHNIQUES, 2) if not are_alternatives(a, b)]


def cell(a: Technique, b: Technique, reasons: list[str]) -> str:
    """reasons: those in the notes; one more is added where it is missing."""
    if are_alternatives(a, b):
        return "–"
    if (reason := refusal(a, b)) is None:
        return "yes"
    if reason not in reasons:
        reasons.append(reason)
    return f"no [{reasons.index(reason) + 1}]"


def table() -> str:
    """The lower half of the matrix as Markdown, and why what is refused is."""
    reasons: list[str] = []
    numbers = range(1, len(TECHNIQUES))
    lines = [
        "| | | " + " | ".join(map(str, numbers)) + " |",
        "|---:|---|" + ":-:|" * len(numbers),
    ]
    for i, technique in enumerate(TECHNIQUES):
        cells = [cell(TECHNIQUES[j], technique, reasons) if j < i else "" for j in range(i)]
        cells += [""] * (len(numbers) - len(cells))
        lines.append(f"| {i + 1} | {technique.name} | " + " | ".join(cells) + " |")
    shown = [re.sub(r"{\w+}", "…", reason) for reason in reasons]
    notes = [f"{number}. `{reason}`" for number, reason in enumerate(shown, start=1)]
    legend = "–: one or the other. no [1]: refused when the engine starts, with the message"
    return "\n".join([*lines, "", legend, "", *notes])


def written(readme: str) -> str:
    """A README with the table between its two comments. Raises ValueError where it has none."""
    pattern = re.compile(f"{OPENING}\n.*?{CLOSING}", re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(
            f"the README must have {OPENING} and {CLOSING} once, on lines of their own"
        )
    return pattern.sub(lambda _: f"{OPENING}\n{table()}\n{CLOSING}", readme)


def main() -> int:
    path = folder_of(PART) / "README.md"
    path.write_text(written(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
