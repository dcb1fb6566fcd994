"""`NoSyncs` raises on everything that it says it sees, and on nothing that an asynchronous step needs."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from part05.sampler import Sampled, sample
from part08.rejection_sampler import RejectionRows, target_probs, verify

from common.device import to_device
from common.kernels import select_ops
from common.logprobs import SampledLogprobs
from common.prompt_logprobs import PromptPiece
from common.sampling import SamplingBatch, SamplingParams
from common.testing.no_syncs import NoSyncs, Synchronizes

X = torch.arange(12.0).view(3, 4)
ROWS, MASK = torch.tensor([2, 0]), torch.tensor([True, False, True])
CPU = torch.device("cpu")


def put(x: torch.Tensor, index: object) -> None:
    x.clone()[index] = 1.0


WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: X[0, 0].item(),
    "bool": lambda: bool(X.any()),
    "if": lambda: 1 if X[0, 0] > 0 else 0,
    "int": lambda: int(X[0, 0]),
    "float": lambda: float(X[0, 0]),
    "slice": lambda: X[: ROWS[0]],
    "equal": lambda: torch.equal(X, X),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "array": lambda: np.asarray(X),
    "cpu": lambda: X.cpu(),
    "to cpu": lambda: X.to("cpu"),
    "to device": lambda: X.to(device=CPU),
    "to device and dtype": lambda: X.to(CPU, torch.float64),
    "nonzero": lambda: X.nonzero(),
    "where alone": lambda: torch.where(X > 1),
    "mask": lambda: X[MASK],
    "mask after a slice": lambda: X[:, :3][:, MASK],
    "put to a mask": lambda: put(X, MASK),
    "masked_select": lambda: X.masked_select(X > 1),
    "unique": lambda: X.unique(),
    "bincount": lambda: ROWS.bincount(),
    "repeat_interleave": lambda: ROWS.repeat_interleave(ROWS),
    "repeat_interleave of rows": lambda: X.repeat_interleave(MASK.long(), dim=0),
    "list": lambda: X[[2, 0]],
    "list of rows": lambda: X[[2, 0], 1],
    "put to a list": lambda: put(X, [2, 0]),
    "array as index": lambda: X[np.array([2, 0])],
    "torch.tensor": lambda: torch.tensor([2, 0]),
    "torch.tensor of one": lambda: torch.tensor(2.0),
    "as_tensor": lambda: torch.as_tensor([2, 0]),
    "from_numpy": lambda: torch.from_numpy(np.zeros(3)),
}
GOING_ON: dict[str, Callable[[], object]] = {
    "rows": lambda: X[ROWS],
    "rows and a column": lambda: X[ROWS, 0],
    "pairs": lambda: X[ROWS, ROWS],
    "slices": lambda: X[1:, :-1],
    "put": lambda: put(X, ROWS),
    "put to a place": lambda: put(X, 0),
    "where": lambda: X.where(X > 1, float("nan")),
    "masked_fill": lambda: X.masked_fill(X > 1, 0.0),
    "sums and sorts": lambda: (X.cumsum(1), X.topk(2), X.argmax(1), X.sort(1), X.logsumexp(1)),
    "scatter": lambda: X.scatter(1, ROWS[:, None], 1.0),
    "index_copy": lambda: X.index_copy(0, ROWS, X[:2]),
    "index_add": lambda: X.index_add(0, ROWS, X[:2]),
    "repeat_interleave": lambda: ROWS.repeat_interleave(ROWS, output_size=2),
    "made there": lambda: (torch.zeros(3), torch.arange(3), torch.full((2,), 1.5)),
    "dtype": lambda: X.to(torch.float64).double(),
    "copy": lambda: X.to(CPU, non_blocking=True),
    "to_device": lambda: X[to_device([2, 0], torch.int64, CPU)],
    "iteration": lambda: [row.sum() for row in X],
}


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("run", WAITING.values(), ids=WAITING.keys())
def test_what_waits_is_found(run: Callable[[], object], is_inference: bool) -> None:
    run()
    waits = pytest.raises(Synchronizes, match=r"test_no_syncs\.py:\d+$")
    with torch.inference_mode(is_inference), waits, NoSyncs():
        run()
    run()  # afterwards nothing is watched


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("run", GOING_ON.values(), ids=GOING_ON.keys())
def test_what_does_not_wait_is_let_through(run: Callable[[], object], is_inference: bool) -> None:
    with torch.inference_mode(is_inference), NoSyncs():
        run()


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_sampling_does_not_wait(kernels: str) -> None:
    """With all that a batch may ask for; what happens inside the kernels does not count."""
    ops, logits = select_ops(kernels), torch.randn(4, 50)
    params = [
        SamplingParams(top_p=0.9, logprobs=2, presence_penalty=1.0),
        SamplingParams(logit_bias={3: 5.0}),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(top_k=3),
    ]
    batch = SamplingBatch.build(logits, params, range(4), [3] * 4, [[1, 2]] * 4)
    batch = replace(batch, choices=torch.zeros_like(batch.positions))
    hidden, piece = torch.randn(9, 50), PromptPiece(0, 2, 1, [5, 6, 7], 3)
    with torch.inference_mode(), NoSyncs():
        token_ids = sample(ops, logits, batch)
        found = SampledLogprobs.of(logits, token_ids, batch.num_logprobs)
        scores = piece.score(hidden, lambda rows: rows)
        sampled = Sampled(token_ids, found, [scores]).to(CPU, non_blocking=True)
    assert len(sampled.lists()[0]) == 4 and len(scores.logprobs) == 3


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_verifying_drafts_does_not_wait(kernels: str) -> None:
    ops, rows = select_ops(kernels), torch.tensor([1, 2])
    lengths, drafts = torch.tensor([1, 2, 0]), torch.randint(0, 30, (3, 2))
    params = [SamplingParams(top_p=0.9)] * 4
    batch = SamplingBatch.build(torch.zeros(4, 30), params, range(4), [3] * 4, [[]] * 4)
    with torch.inference_mode(), NoSyncs():
        filters = batch.filters(torch.arange(4))
        p = target_probs(ops, torch.randn(4, 30), **filters)
        q = target_probs(ops, torch.randn(2, 30), **batch.filters(rows))
        rejection = RejectionRows(rows, p, q, rows, rows, rows)
        verified = verify(drafts, lengths, torch.zeros(6, dtype=torch.int64), rejection)
    assert verified.token_ids.shape == (3, 3)
