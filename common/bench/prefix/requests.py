"""Requests that depend on each other, in memory and as JSON lines.

As JSON lines, for other servers, a request is

    {"request_id": "agent-1", "stage": 1, "depends_on": "agent-0", "parent": "agent-0",
     "prompt_token_ids": [...], "max_tokens": 24}

depends_on: it is handed over when that request has ended; null: at the start. parent: its prompt is
that request's whole prompt, then all tokens which that generated, then prompt_token_ids; null: its
prompt is prompt_token_ids alone. stage: 0 at the start, else one more than that of depends_on; who
cannot follow single requests may run stage after stage. Every request decodes greedily, and
no token ends it before max_tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One request, and when it may come; the fields are described above."""

    request_id: str
    stage: int
    depends_on: str | None
    parent: str | None
    prompt_token_ids: list[int]
    max_tokens: int


def whole_lengths(requests: list[Request]) -> dict[str, int]:
    """Tokens of each request at its end, prompt and output together."""
    lengths: dict[str, int] = {}
    for request in requests:
        before = lengths[request.parent] if request.parent else 0
        length = before + len(request.prompt_token_ids) + request.max_tokens
        lengths[request.request_id] = length
    return lengths


def whole_prompts(
    requests: list[Request], outputs: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """The prompts as the engine gets them, with what their parents have generated."""
    prompts: dict[str, list[int]] = {}
    for request in requests:
        before = prompts[request.parent] + outputs[request.parent] if request.parent else []
        prompts[request.request_id] = before + request.prompt_token_ids
    return prompts


def possible_hits(
    requests: list[Request], outputs: Mapping[str, list[int]], block_size: int
) -> int:
    """Prompt tokens that a cache of whole blocks would find if it forgot nothing.

    The last token of a prompt is always computed, and that of an output never is.
    """
    blocks: dict[tuple[int, tuple[int, ...]], int] = {}  # (block before it, its tokens): its number
    num_found = 0
    for name, prompt in whole_prompts(requests, outputs).items():
        tokens, node, is_prefix = prompt + outputs[name][:-1], -1, True
        for end in range(block_size, len(tokens) + 1, block_size):
            key = node, tuple(tokens[end - block_size : end])
            is_prefix = is_prefix and key in blocks and end < len(prompt)
            num_found += block_size * is_prefix
            node = blocks.setdefault(key, len(blocks))
    return num_found


def write_jsonl(path: Path, requests: list[Request]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(request)) + "\n" for request in requests]
    path.write_text("".join(lines), encoding="utf-8")


def read_jsonl(path: Path) -> list[Request]:
    """What `write_jsonl` wrote. Raises ValueError that names the line."""
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            requests.append(
                Request(**{field.name: values[field.name] for field in fields(Request)})
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: no request: {error!r}") from None
    return requests
