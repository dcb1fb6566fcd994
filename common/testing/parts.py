"""The parts that exist, and engines built from them: what the one suite over all parts runs on."""

import ast
import gc
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def existing_parts() -> list[int]:
    """Numbers of the parts in this repository, ascending."""
    matches = (re.fullmatch(r"part(\d\d)_\w+", path.name) for path in ROOT.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def engine_files(part: int) -> dict[str, bytes]:
    """The files of a part's engine by name: `engine.py`, and what it imports of its own part."""
    [folder] = ROOT.glob(f"part{part:02d}_*")
    found: dict[str, bytes] = {}
    names = ["engine.py"]
    while names:
        name = names.pop()
        if name not in found and (folder / name).exists():
            found[name] = (folder / name).read_bytes()
            tree = ast.walk(ast.parse(found[name]))
            own = [node for node in tree if isinstance(node, ast.ImportFrom) and node.level == 1]
            names += [f"{node.module}.py" for node in own if node.module]
    return found


def distinct_engines() -> list[int]:
    """The parts whose engine is another than the part's before. The suite over all parts runs these:
    a part whose idea lies around the engine (part 10's router) has tests of its own."""
    parts = existing_parts()
    engines = {part: engine_files(part) for part in parts}
    return [part for part in parts if engines[part] != engines.get(part - 1)]


PARTS = distinct_engines()


def module_of(part: int, name: str) -> Any:
    """A module of a part: `module_of(2, "engine")` is `part02.engine`."""
    return importlib.import_module(f"part{part:02d}.{name}")


def folder_of(part: int) -> Path:
    """The folder of a part."""
    [folder] = ROOT.glob(f"part{part:02d}_*")
    return folder


def distinct_files(name: str) -> list[int]:
    """The parts in which a file has new content: unit tests run once for each."""
    seen: dict[bytes, int] = {}
    for part in PARTS:
        path = folder_of(part) / name
        if path.exists():
            seen.setdefault(path.read_bytes(), part)
    return list(seen.values())


# Parts whose HTTP edge has new content, and the latest: in the others a request meets the same code
# until it reaches the engine.
HTTP_PARTS = sorted({*distinct_files("server.py"), PARTS[-1]})


def short_form(parts: Iterable[int], short: Iterable[int]) -> list[Any]:
    """Parts as pytest's parameters: in the short form run the latest and those of `short`, the others in
    the long one."""
    import pytest

    parts = list(parts)
    kept = {*short, parts[-1]}
    return [pytest.param(part, marks=[] if part in kept else pytest.mark.long) for part in parts]


def http_parts(*more: int, first: int = 1) -> list[Any]:
    """HTTP_PARTS from `first` on. In the short form run `first`, the latest, and `more`: what these tests
    look at is in common, and a part's server is a few lines."""
    return short_form([part for part in HTTP_PARTS if part >= first], {first, *more})


# Bytes, unless a test asks for other: many engines live at once. The tiny models need little.
KV_MEMORY = 256 << 20
TINY_KV_MEMORY = 16 << 20


def engine_of(part: int, model: str, **flags: Any) -> Any:
    """An engine of a part, kept for later tests that want the same.

    Of tiny models the last 96 are kept, of others the last one: of the embedded model it has more
    than a gigabyte. Tests over all parts should therefore come part by part:
    `pytest.mark.parametrize("part", PARTS, scope="module")`.
    """
    return (tiny_engine if model.startswith("random:tiny-") else large_engine)(part, model, **flags)


def make_engine(part: int, model: str, **flags: Any) -> Any:
    config_class = module_of(part, "config").EngineConfig
    has_cache = any(field.name == "kv_cache_memory" for field in fields(config_class))
    if has_cache and not flags.keys() & {"num_blocks", "kv_cache_memory"}:
        is_tiny = model.startswith("random:tiny-")
        flags["kv_cache_memory"] = TINY_KV_MEMORY if is_tiny else KV_MEMORY
    return module_of(part, "engine").LLMEngine(config_class(model=model, **flags))


@lru_cache(maxsize=96)
def tiny_engine(part: int, model: str, **flags: Any) -> Any:
    return make_engine(part, model, **flags)


@lru_cache(maxsize=1)
def large_engine(part: int, model: str, **flags: Any) -> Any:
    gc.collect()  # of those that are no longer kept
    return make_engine(part, model, **flags)


def wrap_model(
    engine: Any, patch: Any, around: Callable[[list[int], int, Callable[[], Any]], Any]
) -> None:
    """Stand between an engine and its model, in any part.

    patch: pytest's monkeypatch, which undoes it. around(token_ids, num_rows, real) gives the logits,
    [num_rows, vocab], of a forward over these tokens; real() gives the model's own. Drafting passes by it.
    """
    if not hasattr(engine, "runner"):
        run_model = engine.run_model
        patch.setattr(
            engine,
            "run_model",
            lambda token_ids, cache: around(token_ids, 1, lambda: run_model(token_ids, cache)),
        )
        return
    forward = engine.runner.forward

    def wrapped(batch: Any, drafter: Any = None) -> Any:
        if drafter is not None:
            return forward(batch, drafter)
        scores: list[Any] = []  # of prompts; from part 04 on

        def real() -> torch.Tensor:
            logits = forward(batch)
            if isinstance(logits, tuple):
                logits, scores[:] = logits
            return logits

        logits = around(batch.token_ids.tolist(), len(batch.logits_indices), real)
        return (logits, scores) if hasattr(batch, "prompts") else logits

    patch.setattr(engine.runner, "forward", wrapped)


def certain_logits(engine: Any, num_rows: int, token_id: int) -> torch.Tensor:
    """Logits of a model that is sure of one token in every row."""
    logits = torch.zeros(num_rows, engine.vocab_size)
    logits[:, token_id] = 50.0
    return logits
