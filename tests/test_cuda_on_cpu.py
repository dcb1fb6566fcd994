"""The GPU that the CPU plays, engines on its second one, and the clock that is read through events."""

import subprocess
import sys

import numpy as np
import pytest

from common.testing.parts import PARTS, ROOT, distinct_files, module_of

INSTALL = "from common.testing import cuda_on_cpu as fake\nfake.install()\nimport torch\n"


def run(script: str) -> list[str]:
    """Lines that a script prints in a process with such GPUs."""
    done = subprocess.run(
        [sys.executable, "-c", INSTALL + script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_its_tensors_are_where_a_gpu_has_them() -> None:
    lines = run("""
x, h = torch.zeros(4, device="cuda:1"), torch.ones(4, pin_memory=True)
print(x.device, (x + 1)[1:].device, x.is_cuda, torch.empty_like(x).device, x.cpu().device)
def told(call):
    try:
        print("well", call())
    except (RuntimeError, TypeError) as error:
        print(type(error).__name__, str(error)[:60])
told(lambda: x + h)
told(lambda: x.numpy())
torch.cuda.set_sync_debug_mode("error")
for call in (
    lambda: x.tolist(), lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.to("cpu"),
    lambda: h.to(x.device), lambda: x[[0, 1]], lambda: x[x > 0], lambda: x.nonzero(),
    lambda: torch.tensor([1.0], device="cuda:1"), lambda: x.copy_(h),
    lambda: x.repeat_interleave(x.long()), lambda: torch.bincount(x.long()),
):
    told(call)
told(lambda: h.to(x.device, non_blocking=True).device)
told(lambda: x.to("cpu", non_blocking=True).tolist())
told(lambda: x[torch.arange(2, device=x.device)].shape)
told(lambda: h.tolist())
""")
    assert lines[0] == "cuda:1 cuda:1 True cuda:1 cpu"
    assert "expected all tensors to be on the same device" in lines[1]
    assert lines[2].startswith("TypeError")
    waits, free = lines[3:15], lines[15:]
    assert all(line.startswith("RuntimeError called a synchronizing") for line in waits), waits
    assert len(free) == 4 and all(line.startswith("well") for line in free), free


def test_its_graphs_run_again_over_the_same_memory() -> None:
    lines = run("""
x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = (x * 2).view(3, 1)[:, 0] + 1
    total += y
before = y.data_ptr(), total.tolist()
x.fill_(5)
graph.replay()
print(y.tolist(), total.tolist(), before[1], before[0] == y.data_ptr())
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
except RuntimeError as error:
    print(error)
""")
    assert lines[0] == "[11.0, 11.0, 11.0] [14.0, 14.0, 14.0] [3.0, 3.0, 3.0] True"
    assert "synchronizing" in lines[1]


def test_a_second_gpu_is_the_only_one_that_is_used() -> None:
    """Also by another thread than the one that has built the engine."""
    lines = run(f"""
import importlib, threading
for part in {list(PARTS)}:
    fake.GPU.used.clear()
    fake.GPU.current = 0
    config = importlib.import_module(f"part{{part:02d}}.config").EngineConfig
    engine = importlib.import_module(f"part{{part:02d}}.engine").LLMEngine(
        config(model="random:tiny-llama", device="cuda:1", dtype="float32")
    )
    def serve():
        with fake.OnCpu():
            assert fake.GPU.current == 0
            engine.generate([[5, 6, 7]], progress=False)
            print(part, sorted(fake.GPU.used), flush=True)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
""")
    assert lines == [f"{part} [1]" for part in PARTS]


class Event:
    """An event of a clock in nanoseconds; the time between two is told in float32."""

    now = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return float(np.float32((other.at - self.at) / 1e6))


@pytest.mark.parametrize("part", distinct_files("device_queue.py"))
def test_a_step_is_as_long_after_ten_hours(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds from the first event on, in float32, would be wrong by 2 ms by then."""
    module = module_of(part, "device_queue")
    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "now", 0)
    clock = module.GpuClock()
    first = clock.last_seconds

    def seconds_after(nanoseconds: int) -> float:
        Event.now += nanoseconds
        event = Event()
        event.record()
        return clock.seconds(event)

    for _ in range(10):
        seconds_after(3600 * 10**9)  # an hour without requests
        for _ in range(500):
            began = seconds_after(41_000)
            assert abs(seconds_after(1_370_001) - began - 1.370001e-3) < 1e-9
    assert abs(clock.last_seconds - first - Event.now / 1e9) < 2e-3
