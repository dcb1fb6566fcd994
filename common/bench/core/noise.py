"""Who else was using the machine: a number measured beside other work should say so."""

import os
import time

from common.bench.core.machine import read_text, usable_cores

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
QUIET = 0.1  # share of the cores that others may use before it is told


class OtherWork:
    """Counts, from its creation on, the cores kept busy by others than this process and those of
    its children that have ended. What a hypervisor takes away ("steal") counts as others'."""

    def __init__(self) -> None:
        self._start = (busy_seconds(), own_seconds(), time.perf_counter())

    def cores(self) -> float | None:
        """Mean number of cores since the start; None where the system's count is not to be had or
        is of more cores than this process may use."""
        busy = busy_seconds()
        if busy is None or self._start[0] is None:
            return None
        own = own_seconds() - self._start[1]
        wall = time.perf_counter() - self._start[2]
        return round(max(0.0, (busy - self._start[0] - own) / wall), 2)


def busy_seconds() -> float | None:
    """CPU seconds that all cores together have spent on anything but waiting."""
    fields = read_text("/proc/stat").partition("\n")[0].split()
    if len(fields) < 9 or usable_cores() != os.cpu_count():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def own_seconds() -> float:
    return sum(os.times()[:4])


def disturbance(other_cores: float | None) -> str | None:
    """A remark where others used a noticeable share of the machine, else None."""
    if other_cores is None or other_cores < QUIET * usable_cores():
        return None
    return f"other processes kept {other_cores:.1f} of {usable_cores()} cores busy meanwhile"
