"""Variants that `parallel engines` compares: one engine, ranks of one engine, or several engines."""

import contextlib
import json
import selectors
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from common.bench import BenchError
from common.bench.core.processes import child_environment, last_line
from common.bench.parallel.layouts import Layout

TIMEOUT = 600.0  # seconds that an engine may take to start, or for a run


@dataclass
class Variant:
    """One way to use the cores, and what has been measured of it.

    settings: of each of its engines. runs: by point and round, as `Engines.run` answered.
    """

    name: str
    layout: Layout
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    other_cores: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def num_rounds(self) -> int:
        return max(map(len, self.runs.values()), default=0)


class Engines:
    """The engines of a variant, each in a fresh process, from entering to leaving the context."""

    def __init__(self, part: int, model: str, variant: Variant, verbose: bool = False) -> None:
        self.job = {"part": part, "model": model, "settings": variant.settings}
        self.verbose = verbose
        self.children: list[subprocess.Popen[str]] = []
        self.num_engines = variant.layout.dp
        self.folder = tempfile.TemporaryDirectory(prefix="engines-")
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> "Engines":
        command = [sys.executable, "-m", "common.bench.parallel.engine_worker"]
        try:
            for number in range(self.num_engines):
                with self.errors_of(number).open("w") as errors:
                    child = subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=None if self.verbose else errors,
                        env=child_environment(),
                        text=True,
                    )
                self.children.append(child)
            self.facts = self.ask([self.job] * len(self.children))[0]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Hand the prompts out evenly, to all engines at once, and wait for the last.

        seconds: the longest; num_tokens: of all; outputs: in the prompts' order; sent: the first's, as
        is whole_s, the time of a run that decodes with its prefill.
        """
        size = len(self.children)
        parts = [prompts[number::size] for number in range(size)]
        busy = [number for number, part in enumerate(parts) if part]
        jobs = [{"prompts": parts[number], "max_tokens": max_tokens} for number in busy]
        answers = self.ask(jobs)
        outputs: list[Any] = [None] * len(prompts)
        for number, answer in zip(busy, answers, strict=True):
            outputs[number::size] = answer["outputs"]
        return {
            "seconds": max(answer["seconds"] for answer in answers),
            "num_tokens": sum(answer["num_tokens"] for answer in answers),
            "outputs": outputs,
            "num_computed": sum(answer["num_computed"] for answer in answers),
            "whole_s": answers[0].get("whole_s"),
            "sent": answers[0]["sent"],
        }

    def ask(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give the first engines a job each, all before the first answer is read."""
        for child, job in zip(self.children, jobs, strict=False):
            with contextlib.suppress(BrokenPipeError):  # its answer will be missing
                child.stdin.write(json.dumps(job) + "\n")
                child.stdin.flush()
        return [self.answer(number) for number in range(len(jobs))]

    def answer(self, number: int) -> dict[str, Any]:
        child = self.children[number]
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT):
                raise BenchError(f"engine {number} gave no answer in {TIMEOUT:g} s")
        line = child.stdout.readline()
        if not line:
            status = child.wait()
            reason = last_line(self.errors_of(number).read_text()) or f"exit status {status}"
            raise BenchError(f"engine {number} failed: {reason}")
        return json.loads(line)

    def errors_of(self, number: int) -> Path:
        """Where an engine's standard error goes."""
        return Path(self.folder.name) / str(number)

    def close(self) -> None:
        for child in self.children:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        for child in self.children:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdout.close()
        self.folder.cleanup()
