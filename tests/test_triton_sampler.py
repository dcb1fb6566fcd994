"""How the GPU's sampler is launched: what Triton compiles for it does not depend on the batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

SAMPLING = ("EXTREMES", "MARKS", "GATHER", "THRESHOLD", "NOISY", "WINNER")
FILTERING = SAMPLING[:4]


@dataclass
class Recorder:
    """In the place of a Launcher: notes what a launch is, and what its variant depends on."""

    name: str
    kernel: Any
    launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)

    def __call__(
        self,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        assert len(self.kernel.params) == len(arguments) + len(constants), self.name
        variant = [constants, num_warps, num_stages]
        for parameter, argument in zip(self.kernel.params, arguments, strict=False):
            assert isinstance(argument, Tensor), f"{parameter.name} is {argument!r}"  # no numbers
            is_aligned = argument.data_ptr() % 16 == 0
            variant.append((argument.dtype, is_aligned or parameter.do_not_specialize_on_alignment))
        self.launches.append((self.name, grid, tuple(variant)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    from common.kernels.triton import sampler

    found: list[Any] = []
    for name in SAMPLING:
        kernel = getattr(sampler, name).kernel
        monkeypatch.setattr(sampler, name, Recorder(name, kernel, found))
    yield found


def run(num_rows: int, logits: Tensor, is_choosing: bool, begin: int = 0) -> None:
    """Sample and filter, nothing is computed. begin: where the columns lie in a larger buffer, as
    those of a step do."""
    from common.kernels.triton.ops import TritonOps

    floats = torch.zeros(3, num_rows + begin)[:, begin:]
    numbers = torch.zeros(4, num_rows + begin, dtype=torch.int64)[:, begin:]
    temperature, top_p, min_p = floats
    top_k, seeds, positions, choices = numbers
    columns = (temperature, top_k, top_p, min_p, seeds, positions)
    TritonOps().sample(logits[:num_rows], *columns, choices if is_choosing else None)
    TritonOps().smallest_kept(logits[:num_rows].float(), top_k, top_p, min_p)


@pytest.mark.parametrize("vocab", [5003, 12000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_batch_compiles_anything_more(
    launches: list[Any], vocab: int, dtype: torch.dtype
) -> None:
    """Sizes 1 to 300, with choices and without, columns anywhere: what two rows compile is all."""
    logits = torch.zeros(300, vocab, dtype=dtype)
    run(2, logits, True)
    assert [name for name, _, _ in launches] == [*SAMPLING, *FILTERING]
    first = {(name, variant) for name, _, variant in launches}
    assert len(first) == (6 if dtype == torch.float32 else 10)
    launches.clear()
    for num_rows in range(1, 301):
        run(num_rows, logits, num_rows % 2 == 0, num_rows % 3)
    assert {(name, variant) for name, _, variant in launches} == first


def test_one_row_is_spread_over_its_chunks(launches: list[Any]) -> None:
    """As are few; with many, those that leave at once are not so many."""
    logits = torch.zeros(300, 49152, dtype=torch.bfloat16)
    for num_rows in (1, 8, 300):
        launches.clear()
        run(num_rows, logits, True)
        grids = {name: grid for name, grid, _ in launches}
        assert grids["EXTREMES"] == grids["NOISY"] == (num_rows, 12)
        assert grids["MARKS"] == grids["GATHER"] == (num_rows, 3 if num_rows == 300 else 12)
        assert grids["THRESHOLD"] == grids["WINNER"] == (num_rows,)


def test_rows_that_are_not_contiguous_are_made_so(launches: list[Any]) -> None:
    """Places follow from the vocabulary: a stride would be one thing more to compile for."""
    run(3, torch.zeros(3, 6000, dtype=torch.bfloat16)[:, :5003], True)
    run(3, torch.zeros(3, 5003, dtype=torch.bfloat16), True)
    assert launches[:10] == launches[10:]
