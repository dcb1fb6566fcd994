"""Launches on a GPU that is not there: Triton compiles, and its driver is a fake.

Triton is imported by tests and not by this file, as in test_triton_launches.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch

from common.testing.kernels.launches import metadata_of

if TYPE_CHECKING:
    from common.testing.kernels.fake_gpu import FakeDriver

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]


@pytest.fixture(scope="module")
def fake_driver() -> Iterator["FakeDriver"]:
    from common.testing.kernels.fake_gpu import fake_gpu

    with fake_gpu() as driver:
        yield driver


@pytest.fixture
def fake(fake_driver: "FakeDriver") -> "FakeDriver":
    fake_driver.launched.clear()
    return fake_driver


def norm_arguments(num_rows: int, eps: float, dtype: torch.dtype = torch.bfloat16) -> tuple:
    x, weight = torch.zeros(num_rows, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    return x, None, weight, torch.empty_like(x), eps


CONSTANTS = (64, 0, 64, 64)


def norm_launcher() -> Any:
    from common.kernels.triton.elementwise import norm_kernel
    from common.kernels.triton.launch import Launcher

    return Launcher(norm_kernel)


def triton_s_way(error: type[Exception] = AssertionError) -> Any:
    """A context in which a launch by Triton itself raises."""
    from triton.runtime.jit import JITFunction

    return mock.patch.object(JITFunction, "run", side_effect=error)


def test_a_variant_is_launched_directly(fake: "FakeDriver") -> None:
    launcher = norm_launcher()
    launcher((3,), norm_arguments(3, 1e-5), CONSTANTS, 1)
    arguments = norm_arguments(7, 1e-6)
    with triton_s_way():
        launcher((7,), arguments, CONSTANTS, 1)
    assert len(launcher.variants) == 1
    width, height, depth, _, function, metadata, *rest = fake.launched[-1]
    assert (width, height, depth, function) == (7, 1, 1, 1)
    assert metadata == fake.launched[0][5]
    x, _, weight, out, eps = arguments
    addresses = [x.data_ptr(), None, weight.data_ptr(), out.data_ptr()]
    assert rest == [None, None, None, *addresses, eps, *CONSTANTS]


def test_a_variant_for_each_format(fake: "FakeDriver") -> None:
    launcher = norm_launcher()
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        launcher((3,), norm_arguments(3, 1e-5, dtype), CONSTANTS, 1)
    assert len(launcher.variants) == 2 and len(fake.launched) == 3


def test_an_unaligned_tensor_goes_triton_s_way(fake: "FakeDriver") -> None:
    launcher = norm_launcher()
    x, *rest = norm_arguments(3, 1e-5)
    launcher((3,), (x, *rest), CONSTANTS, 1)
    unaligned = torch.zeros(3 * 64 + 1, dtype=x.dtype)[1:].view(3, 64)
    with (
        triton_s_way(RuntimeError),
        pytest.raises(RuntimeError),
    ):
        launcher((3,), (unaligned, *rest), CONSTANTS, 1)
    launcher((3,), (unaligned, *rest), CONSTANTS, 1)
    assert len(launcher.variants) == 1 and len(fake.launched) == 2


def test_lengths_need_no_alignment(fake: "FakeDriver") -> None:
    """Views of metadata may begin anywhere: their variant is the same."""
    from common.kernels.triton.ops import TritonOps

    ops, dtype = TritonOps(), torch.bfloat16
    query, cache = torch.zeros(3, 4, 64, dtype=dtype), torch.zeros(4, 1, 2, 16, 2, 64, dtype=dtype)
    for first in (0, 1):
        starts = torch.arange(5, dtype=torch.int32)[first : first + 4]
        lengths = torch.ones(4, dtype=torch.int32)[first : first + 3]
        tables = torch.zeros(4, 3, dtype=torch.int32)[first : first + 3]
        metadata = metadata_of([(1, 1)] * 3)
        changed = {"cu_seqlens_q": starts, "seq_lens": lengths, "block_tables": tables}
        ops.attention(query, cache, 0, replace(metadata, **changed), 0.1)
        with triton_s_way():
            ops.attention(query, cache, 0, replace(metadata, **changed), 0.1)


def test_a_listener_hears_of_launches(fake: "FakeDriver") -> None:
    from triton import knobs

    launcher, heard = norm_launcher(), []
    launcher((3,), norm_arguments(3, 1e-5), CONSTANTS, 1)
    with mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [heard.append]):
        launcher((3,), norm_arguments(3, 1e-5), CONSTANTS, 1)
    assert fake.launched[-1][7] is knobs.runtime.launch_enter_hook  # which a real launch calls


def test_no_kernel_may_specialise_on_a_number(fake: "FakeDriver") -> None:
    with pytest.raises(AssertionError, match="norm_kernel specialises on eps"):
        norm_launcher()((3,), norm_arguments(3, 16), CONSTANTS, 1)


class OnSecondGpu(torch.Tensor):
    def get_device(self) -> int:
        return 1


def test_a_launch_is_on_its_tensors_gpu(
    fake: "FakeDriver", monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [0]

    @contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr("common.kernels.triton.launch.current_device", lambda: current[-1])
    monkeypatch.setattr("common.kernels.triton.launch.current_stream", lambda index: 100 + index)
    monkeypatch.setattr(torch.cuda, "device", device)
    launcher = norm_launcher()
    x, *rest = norm_arguments(3, 1e-5)
    for first in (x, x.as_subclass(OnSecondGpu), x.as_subclass(OnSecondGpu)):
        launcher((3,), (first, *rest), CONSTANTS, 1)
    assert len(launcher.variants) == 2  # one a GPU
    assert fake.launched[-1][3] == 101 and current == [0]
