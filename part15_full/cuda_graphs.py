"""Decode steps whose launches are captured once and replayed as one.

A decode step makes some hundred launches, always the same ones. On a GPU a launch costs the host some
microseconds. Where the model or the batch is small that is longer than the kernel runs, and the device
waits for the host. A CUDA graph is a captured list of launches, and replaying it costs one launch. A
replay reads the captured addresses, so input buffers, block tables and the batch's size are fixed. So
there is a graph for each of some batch sizes, and a batch is padded up to the next. The graphs are
captured at the start, the largest first. They share one memory pool, since one runs at a time.

On a CPU the launches are calls of kernels, and Python is what they cost. `common.kernels.recording`
records the calls of a step and repeats them from machine code. Noting them costs as much as two to
six replays save, so a size is recorded when it has occurred twice. It is not padded, because on a CPU
each extra row costs its arithmetic.

Steps with prompt tokens are launched from Python: their sizes rarely repeat. `Graphs.why_not` lists the
engines that launch every step from Python.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from common.distributed import Group
from common.kernels import AttentionMetadata, Ops
from common.kv_transfer.options import TELLING
from common.packed_fields import PackedFields

from .config import EngineConfig
from .input_batch import Batch, Bucket

if TYPE_CHECKING:
    from .model_runner import ModelRunner, Runnable

LARGEST_SIZE = 512
MOST_RECORDINGS = 512  # of steps, on a CPU; each takes some 60 KB
UNRECORDED = 2  # steps of a size that come before the one that is recorded, on a CPU


def sizes_to_capture(most: int) -> list[int]:
    """Batch sizes, as vLLM chooses them: 1, 2, 4, the multiples of 8, and `most`, up to 512."""
    most = min(most, LARGEST_SIZE)
    return [size for size in (1, 2, 4, *range(8, most + 1, 8)) if size < most] + [most]


class CudaGraph:
    """A captured forward. Each call writes its result into the same tensor, and returns it."""

    def __init__(self, run: Callable[[], torch.Tensor], pool: Any, group: Group) -> None:
        """group: the ranks that the forward runs on."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries allocate their workspaces here
        torch.cuda.current_stream().wait_stream(stream)
        self.graph, self.group = torch.cuda.CUDAGraph(), group
        before = group.num_bytes_sent
        # Other threads wait for events and copies meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = run()
        self.num_bytes, group.num_bytes_sent = group.num_bytes_sent - before, before

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        self.group.num_bytes_sent += self.num_bytes
        return self.result


class RecordedSteps:
    """The same on a CPU: a list of kernel launches. The recorded run has computed the first result."""

    def __init__(self, run: Callable[[], torch.Tensor], arena: Any) -> None:
        """Raises CannotRecordError."""
        from common.kernels.recording import record

        self.recording, self.result = record(arena, run)

    def __call__(self) -> torch.Tensor:
        self.recording()
        return self.result


class Graphs:
    """The captured forwards of a runner: those of its model, and those of the draft model."""

    def __init__(self, config: EngineConfig, device: torch.device, ops: Ops) -> None:
        self.on_gpu, self.ops = device.type == "cuda", ops
        self.reason = self.why_not(config, ops)
        self.most_drafts = config.num_speculative_tokens or 0
        self.sizes = sizes_to_capture(config.max_num_seqs)
        self.max_seq_len = 0  # of any sequence; 0 until the KV cache is built
        self.captured: dict[tuple[Any, ...], Callable[[], torch.Tensor]] = {}
        self.pool: Any = None  # memory that all graphs share, since one runs at a time
        self.input: PackedFields | None = None  # a CPU's fixed input; the host's buffers take turns
        self.num_replays = 0
        self.unrecorded: Counter[tuple[Any, ...]] = Counter()

    def why_not(self, config: EngineConfig, ops: Ops) -> str | None:
        """Why every step is launched from Python; None where decode steps are captured."""
        if config.enforce_eager:
            return "enforce_eager is on"
        if config.enable_expert_parallel:
            return "experts are spread over ranks"
        if (number := config.pipeline_parallel_size) > 1:
            return f"pipeline_parallel_size is {number}: stages wait for each other in a forward"
        if config.role in TELLING:
            return f"role is {config.role}: keys and values are told layer by layer"
        if not self.on_gpu and config.compile != "off":
            return f"compile is {config.compile}: what it launches on a CPU is not seen"
        if ops.name not in (("triton", "flash") if self.on_gpu else ("cpu",)):
            return f"kernels is {ops.name}"
        return None

    def group(self, group: Group) -> Group:
        """The same ranks, with sums that a recording can repeat where steps are recorded."""
        if self.on_gpu or self.reason is not None or group.size == 1:
            return group
        from common.distributed.recorded import RecordedGroup

        return RecordedGroup(group)

    def bucket(self, counts: list[int]) -> Bucket | None:
        """The bucket for a batch in which each sequence runs counts[i] tokens and needs the logits
        after all of them; None where no graph serves it."""
        each = counts[0]
        if self.reason is not None or not self.max_seq_len or any(c != each for c in counts):
            return None
        if each > 1 + self.most_drafts or (self.on_gpu and 1 < each <= self.most_drafts):
            return None
        num_seqs = len(counts)
        if self.on_gpu:
            if num_seqs > self.sizes[-1]:
                return None
            num_seqs = next(size for size in self.sizes if size >= num_seqs)
        return Bucket(num_seqs, self.max_seq_len, each)

    def run(self, batch: Batch, what: "Runnable") -> torch.Tensor | None:
        """The logits after every token of a batch in a bucket, without padding; None on ranks that do
        not have the logits."""
        key = (batch.bucket, what.model, what.kv_data.data_ptr(), what.layers is None)
        if self.input is not None:
            self.input.words[: len(batch.packed)].copy_(batch.packed)
        if key in self.captured:
            self.num_replays += 1
            result = self.captured[key]()
        else:
            forward = partial(self.forward, what, *self.inputs(batch))
            first = self.first_on_gpu if self.on_gpu else self.first_on_cpu
            result = first(key, forward, what.model.group)
        result = result[: len(batch.logits_indices)]
        return result if self.has_logits(what) else what.model.logits(result)

    def first_on_gpu(
        self, key: tuple[Any, ...], forward: Callable[[], torch.Tensor], group: Group
    ) -> torch.Tensor:
        """The result of a forward, which is captured."""
        self.captured[key] = graph = self.capture(forward, group)
        return graph()

    def first_on_cpu(
        self, key: tuple[Any, ...], forward: Callable[[], torch.Tensor], group: Group
    ) -> torch.Tensor:
        """A forward's result, noted while it runs on a CPU when its size has occurred before; where
        that cannot be, no step is from now on. What was computed until then is computed again, and so
        it is on every rank."""
        from common.kernels.recording import CannotRecordError

        if self.unrecorded[key] < UNRECORDED:
            self.unrecorded[key] += 1
            return forward()
        if len(self.captured) >= MOST_RECORDINGS:
            self.captured.pop(next(iter(self.captured)))
        try:
            self.captured[key] = graph = self.capture(forward, group)
            return graph.result
        except CannotRecordError as error:
            self.reason = f"a step cannot be recorded: {error}"
            return forward()

    def has_logits(self, what: "Runnable") -> bool:
        """Whether the captured forward includes the logits. On a GPU it does not, because each graph
        would keep a tensor of them. With several ranks, one gathers them into new tensors each time."""
        return not self.on_gpu and what.model.group.size == 1

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Its token ids, positions and metadata, where a capture is to find them."""
        if self.input is None:
            return batch.token_ids, batch.positions, batch.metadata
        fields = self.input.tensors(batch.shape.lengths())
        names = "cu_seqlens_q", "seq_lens", "slot_mapping"
        metadata = replace(batch.metadata, **{name: fields[name] for name in names})
        return fields["token_ids"], fields["positions"], metadata

    def forward(
        self,
        what: "Runnable",
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """The logits after every token, or the hidden states where logits are not captured."""
        hidden = what.model.forward(token_ids, positions, what.kv_data, metadata, what.layers)
        return what.model.logits(hidden) if self.has_logits(what) else hidden

    def capture(
        self, forward: Callable[[], torch.Tensor], group: Group
    ) -> Callable[[], torch.Tensor]:
        if self.on_gpu:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            return CudaGraph(forward, self.pool, group)
        from common.kernels.recording import Arena, without_reference

        self.pool = self.pool or Arena()
        with without_reference(self.ops):
            return RecordedSteps(forward, self.pool)

    def prepare(self, runner: "ModelRunner") -> None:
        """Serve steps from now on, over the runner's KV cache; on a GPU all graphs are captured now."""
        self.max_seq_len = runner.max_model_len
        if self.reason is not None:
            return
        if not self.on_gpu:
            from common.kernels.cpu.launches import Launches

            self.input = PackedFields(*runner.inputs.buffers.sizes, runner.device)
            return Launches()()  # the kernel that replays is loaded now, and not in a step
        try:
            self.capture_all(runner)
        except torch.OutOfMemoryError:
            raise ValueError(
                "gpu_memory_utilization leaves no room for CUDA graphs: lower it, or enforce_eager"
            ) from None

    def wake_up(self, runner: "ModelRunner") -> None:
        """Capture again what sleep has dropped, before a request waits for it. Where others have taken
        the memory meanwhile, every step is launched from Python from now on."""
        if self.on_gpu and self.reason is None:
            try:
                self.capture_all(runner)
            except torch.OutOfMemoryError:
                self.forget()
                self.reason = "there was no room for CUDA graphs when the engine woke up"

    def capture_all(self, runner: "ModelRunner") -> None:
        """Capture each size's graphs, the largest first: the others fit into its memory."""
        for size in tqdm(self.sizes[::-1], desc="CUDA graphs", disable=runner.ranks.rank > 0):
            for what in filter(None, (runner.target, runner.drafter)):
                for each in sorted({1, 1 + self.most_drafts if what is runner.target else 1}):
                    runner.launch(runner.prepare(runner.decoding(size, each)), what).result()

    @property
    def num_bytes(self) -> int:
        """Bytes of a CPU's input and arena. 0 on a GPU, whose pool the allocator counts."""
        if self.on_gpu or self.input is None:
            return 0
        return self.input.words.nbytes + (self.pool.num_bytes if self.pool else 0)

    def stats(self) -> dict[str, Any]:
        return {
            "num_graphs": len(self.captured),
            "num_graph_replays": self.num_replays,
            "graph_bytes": self.num_bytes,
        }

    def forget(self) -> None:
        """Drop all graphs: the memory that they read is gone."""
        self.captured.clear()
        self.unrecorded.clear()
        self.pool = None
