"""A GPU that is not there: Triton compiles for it, and launches do nothing.

In the place of Triton's driver. The operations then run on CPU tensors down to the last line of Python
before the GPU: what they compile, what they launch and what a launch costs the host can be seen.
TRITON_INTERPRET must not be set.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from common.kernels.triton import launch
from common.kernels.triton.attention import Device


@dataclass(frozen=True)
class Architecture:
    capability: int
    shared_memory: int  # bytes a program may have

    @property
    def device(self) -> Device:
        return Device(self.shared_memory, self.capability >= 90)


ARCHITECTURES = {
    "A100": Architecture(80, 163 << 10),
    "RTX 4090": Architecture(89, 99 << 10),
    "H100, H200": Architecture(90, 227 << 10),
    "B200": Architecture(100, 227 << 10),
}


@dataclass
class FakeDriver:
    """What Triton asks its driver for.

    compiled: the source and metadata of every kernel that is launched for the first time.
    launched: the arguments of every launch.
    """

    architecture: Architecture
    compiled: list[tuple[Any, Any]] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def utils(self) -> "FakeDriver":
        return self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture.capability, 32)

    def get_current_device(self) -> int:
        return -1  # the device of CPU tensors

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.architecture.shared_memory, "warpSize": 32}

    def load_binary(self, *binary: Any) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, threads a program may have)"""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.compiled.append((source, metadata))
        return self.launch

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@contextmanager
def fake_gpu(name: str = "H100, H200") -> Iterator[FakeDriver]:
    """Triton's only GPU is that architecture's. One architecture a process: Triton keeps what it
    has compiled by the device's number."""
    fake = FakeDriver(ARCHITECTURES[name])
    before = driver._active
    driver.set_active(fake)
    try:
        with (
            mock.patch.object(Device, "of", lambda device: fake.architecture.device),
            mock.patch.object(launch, "current_stream", fake.get_current_stream),
        ):
            yield fake
    finally:
        driver.set_active(before)
