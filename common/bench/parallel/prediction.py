"""The cost model asked about this machine: calibrated on one engine, it predicts ranks and replicas.

One engine that uses all cores is measured at several batches. From these times the model gets three
numbers: how fast the cores read, how fast they compute, and what a step costs beside that. A rank
with 1/n of the cores gets 1/n of the two rates, and the whole of the third. A replica that works
while others have nothing to do reads faster; how much is measured apart. What ranks say to each other
is measured by `parallel collectives`. No number is fitted to what is predicted.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from common.bench.costs import ModelShape
from common.bench.parallel.cost_model import Batch, step
from common.bench.parallel.layouts import Layout
from common.bench.parallel.links import Fabric, Link, ring_all_reduce
from common.bench.parallel.machines import Device, Machine

NO_LINK = Link(0.0, 0.0, float("inf"))
Work = Sequence[Batch]  # steps after each other


def machine_of(device: Device, num_ranks: int, link: Link = NO_LINK) -> Machine:
    return Machine("this machine", num_ranks, device, Fabric(num_ranks, link, link))


def seconds_of(
    shape: ModelShape, layout: Layout, machine: Machine, work: Work, dtype_bytes: int
) -> float:
    """Of steps after each other. Prefills fill a pipeline as they come, and it drains once."""
    totals = [step(shape, layout, machine, batch, dtype_bytes).total for batch in work]
    if layout.pp == 1 or all(batch.new_tokens == 1 for batch in work):
        return sum(totals)
    counts = [min(layout.pp, -(-batch.num_sequences // layout.dp)) for batch in work]
    stage_times = sum(count * total for count, total in zip(counts, totals, strict=True))
    return (stage_times + (layout.pp - 1) * totals[-1]) / layout.pp


def calibrate(
    shape: ModelShape, measured: Sequence[tuple[Work, float]], dtype_bytes: int = 4
) -> Device:
    """The device with which the model is nearest to what one engine took, by relative deviations.

    measured: (steps, seconds). Raises ValueError for fewer than four: three numbers are sought.
    """
    if len(measured) < 4:
        raise ValueError(f"{len(measured)} measurements: to calibrate takes four")
    times = np.array([seconds for _, seconds in measured])
    lengths = np.array([len(work) for work, _ in measured])
    device = Device(memory_bytes=1e12, read_bytes_per_s=1e10, flops_per_s=1e11, kernel_s=0.0)
    for spread in (10.0, 1.6, 1.1, 1.02):  # each search about the best of the one before
        around = np.geomspace(1 / spread, spread, 13)
        tried = []
        for read, flops in itertools.product(around, around):
            guess = replace(
                device,
                read_bytes_per_s=read * device.read_bytes_per_s,
                flops_per_s=flops * device.flops_per_s,
                step_s=0.0,
            )
            machine = machine_of(guess, 1)
            parts = [seconds_of(shape, Layout(), machine, w, dtype_bytes) for w, _ in measured]
            step_s, error = best_step(np.array(parts), lengths, times)
            tried.append((error, len(tried), replace(guess, step_s=step_s)))
        device = min(tried)[2]
    return device


def best_step(parts: np.ndarray, lengths: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """(seconds to add to each step, sum of squared relative deviations)."""
    weights = lengths / times
    step_s = max(0.0, float((weights * (1 - parts / times)).sum() / (weights**2).sum()))
    return step_s, float((((parts + lengths * step_s) / times - 1) ** 2).sum())


def part_of(
    device: Device, num_ranks: int, num_busy: int | None = None, lone_share: float | None = None
) -> Device:
    """One of so many ranks that share this device's cores.

    num_busy: ranks that work at the same time, all by default; fewer have the memory to themselves.
    lone_share: of the device's reading, what one of its ranks reaches alone (its even part).
    """
    even = 1 / (num_busy or num_ranks)
    reading = max(1 / num_ranks, min(even, lone_share or 1 / num_ranks))
    return replace(
        device,
        memory_bytes=device.memory_bytes / num_ranks,
        read_bytes_per_s=device.read_bytes_per_s * reading,
        flops_per_s=device.flops_per_s / num_ranks,
    )


def measured_link(rows: Sequence[dict[str, Any]], transport: str, ranks: int) -> Link:
    """What `parallel collectives` found of the all-reduce, as a link. Raises ValueError."""
    for row in rows:
        if (row["transport"], row["ranks"], row["operation"]) == (transport, ranks, "all-reduce"):
            per_byte = ring_all_reduce(1.0, ranks).num_bytes  # sent of each byte of the tensor
            speed = per_byte / row["beta_s"] if row["beta_s"] else float("inf")
            return Link(row["alpha_s"], 0.0, speed)
    raise ValueError(f"no all-reduce of {ranks} ranks by {transport} in these collectives")
