"""The forwards of decode steps as CUDA graphs: how fast an engine is whose launches cost nothing.

Part 15 captures graphs itself. From part 05 on the input of a step lies at fixed addresses, padded up
to a bucket, so that a forward captured on one batch serves all batches of its bucket. This puts
graphs into a runner for the time of a measurement, which shows both: that they may be captured, and
what they are worth.
"""

import contextlib
import importlib
import importlib.util
import time
from types import TracebackType
from typing import Any
from unittest import mock

from common.bench.core.processes import part_package

REPLAYS = 20


def captures_itself(part: int) -> bool:
    """Whether a part has graphs of its own."""
    return importlib.util.find_spec(f"{part_package(part)}.cuda_graphs") is not None


def can_capture(part: int) -> bool:
    """Whether a part's input has fixed places, and no graphs of its own."""
    module = importlib.import_module(f"{part_package(part)}.input_batch")
    return hasattr(module, "Bucket") and not captures_itself(part)


class Graphs:
    """A context in which a runner's decode steps replay graphs, captured when first needed."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.bucket_type = importlib.import_module(type(runner.inputs).__module__).Bucket
        self.run_forward = runner.forward
        self.bucket: Any = None  # of the batch that was prepared last
        self.graphs: dict[Any, tuple[Any, Any]] = {}  # bucket -> graph, hidden states
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "Graphs":
        for name in ("prepare", "forward"):
            patch = mock.patch.object(self.runner, name, getattr(self, name))
            self.patches.enter_context(patch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.patches.close()

    def prepare(self, scheduled: Any) -> Any:
        """As the runner's; steps of decoding are padded up to the next power of two."""
        counts = scheduled.num_new_tokens.values()
        self.bucket = None
        if counts and all(count == 1 for count in counts):
            num_seqs = min(1 << (len(counts) - 1).bit_length(), self.runner.config.max_num_seqs)
            self.bucket = self.bucket_type(num_seqs, self.runner.max_model_len)
        return self.runner.inputs.prepare(scheduled, self.bucket)

    def forward(self, batch: Any, *others: Any) -> Any:
        """As the runner's."""
        if self.bucket is None or any(others):
            return self.run_forward(batch, *others)
        if self.bucket not in self.graphs:
            self.graphs[self.bucket] = self.capture(batch)
        graph, hidden = self.graphs[self.bucket]
        graph.replay()
        return self.runner.model.logits(hidden[batch.logits_indices]), []

    def capture(self, batch: Any) -> tuple[Any, Any]:
        """The forward over a batch's places as a graph, and where its result will lie."""
        import torch

        def run() -> Any:
            return self.runner.model.forward(
                batch.token_ids, batch.positions, self.runner.kv.data, batch.metadata
            )

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # workspaces are made here
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = run()
        return graph, hidden

    def microseconds(self) -> float:
        """Of the largest bucket's forward, when replays follow each other at once."""
        import torch

        graph, _ = self.graphs[max(self.graphs, key=lambda bucket: bucket.num_seqs)]
        graph.replay()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - begin) / REPLAYS
