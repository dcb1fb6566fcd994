"""A mixture of quantised experts on a CPU: as `experts`, in one parallel loop, codes for floats.

Gate and up are two weights here, so that a panel of each can be multiplied in turns and the
activation of its columns follow at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.kernels.cpu.elementwise import share
from common.kernels.cpu.experts import (
    PARALLEL_SUM,
    count_units,
    silu_columns,
    sort_by_expert,
    sum_rows,
)
from common.kernels.cpu.integer_weight import IntegerWeight
from common.kernels.cpu.jit import float32_array, helper, int64_array, kernel, next_index
from common.kernels.cpu.linear import LINE
from common.kernels.cpu.pool import spread
from common.kernels.cpu.quantized_linear import (
    GROUP,
    HAS_TERMS,
    IN_FEATURES,
    NUM_FIELDS,
    OUT_FEATURES,
    multiply_quantized,
    scratch,
    sum_groups,
    write_panel,
)
from common.kernels.cpu.quantized_weight import QuantizedPanels
from common.kernels.cpu.vector import PANEL
from common.kernels.quantized import QuantizedWeight

Prepared = QuantizedPanels | IntegerWeight


@dataclass(frozen=True)
class QuantizedExperts:
    """A layer's experts: gate and up, two weights or one, and down, of each."""

    gate_ups: list[tuple[Prepared, ...]]
    downs: list[Prepared]
    # [num_experts, 3, fields] where `quantized_experts` takes them: experts of one format whose
    # inputs are neither rounded nor reordered. Others take turns.
    tables: Tensor | None
    hidden: int
    size: int

    @classmethod
    def pack(
        cls,
        pairs: Iterable[tuple[QuantizedWeight, QuantizedWeight]],
        prepare: Callable[[QuantizedWeight], Prepared],
    ) -> "QuantizedExperts":
        """pairs: gate_up and down of each expert. prepare: `Ops.prepare_weight`. Raises ValueError
        for shapes that do not fit."""
        gate_ups, downs, shapes = [], [], set()
        for gate_up, down in pairs:
            hidden, size = down.shape
            shapes.add((hidden, size))
            check_shapes(gate_up, down, hidden, size)
            gate_ups.append(tuple(prepare(part) for part in split(gate_up)))
            downs.append(prepare(down))
        if len(shapes) != 1:
            raise ValueError(
                f"experts: those of a layer are of one (hidden, size), not {sorted(shapes)}"
            )
        return cls(gate_ups, downs, tables_of(gate_ups, downs), *shapes.pop())

    @property
    def num_bytes(self) -> int:
        gate_ups = sum(panels.num_bytes for parts in self.gate_ups for panels in parts)
        return gate_ups + sum(panels.num_bytes for panels in self.downs)

    def replace(self, index: int, gate_up: QuantizedWeight, down: QuantizedWeight) -> None:
        """Raises ValueError for another shape or format."""
        check_shapes(gate_up, down, self.hidden, self.size)
        parts = split(gate_up)
        if len(parts) != len(self.gate_ups[index]):
            raise ValueError(f"expert: inputs {gate_up.activations}, to replace others")
        for panels, part in zip(self.gate_ups[index], parts, strict=True):
            panels.overwrite(part)
        self.downs[index].overwrite(down)


def check_shapes(gate_up: QuantizedWeight, down: QuantizedWeight, hidden: int, size: int) -> None:
    if gate_up.shape != (2 * size, hidden) or down.shape != (hidden, size):
        raise ValueError(f"expert: gate_up {gate_up.shape}, down {down.shape}, not of {hidden=}")


def is_simple(weight: QuantizedWeight | QuantizedPanels) -> bool:
    """Whether its inputs are taken as they are."""
    return weight.activations is None and weight.order is None


def split(gate_up: QuantizedWeight) -> tuple[QuantizedWeight, ...]:
    """Gate and up; one weight where the kernel does not take them."""
    if not is_simple(gate_up):
        return (gate_up,)
    size = gate_up.shape[0] // 2
    return gate_up.rows(slice(0, size)), gate_up.rows(slice(size, 2 * size))


def tables_of(gate_ups: list[tuple[Prepared, ...]], downs: list[Prepared]) -> Tensor | None:
    """What the kernel is told of each expert; None where it does not take them."""
    rows = [(*parts, down) for parts, down in zip(gate_ups, downs, strict=True)]
    for row in rows:
        if not all(isinstance(panels, QuantizedPanels) and is_simple(panels) for panels in row):
            return None
        if [panels.format for panels in row] != [panels.format for panels in rows[0]]:
            return None
    return torch.stack([torch.stack([panels.table for panels in row]) for row in rows])


@helper
def work(is_first, x, tables, sums, out, starts, first_units, counters, thread, threads):
    """A thread's share of the units, then what is left of the others' (see `experts.work`).

    tables: the fields of each expert's gate, up and down. is_first: silu(gate) * up of the tokens'
    rows x, else the second product.
    """
    which = 0 if is_first else 2
    depth, num_columns = tables[0, which, IN_FEATURES], tables[0, which, OUT_FEATURES]
    num_panels = (num_columns + PANEL - 1) // PANEL
    num_units = first_units[-1]
    spaces = scratch(tables[0, which], len(x))
    num_groups = len(spaces[0])
    for i in range(threads):
        owner = (thread + i) % threads
        begin, end = share(num_units, owner, threads), share(num_units, owner + 1, threads)
        unit = begin + next_index(counters.ctypes.data + owner * LINE)
        expert = 0
        while unit < end:
            while first_units[expert + 1] <= unit:
                expert += 1
            num_blocks = (first_units[expert + 1] - first_units[expert]) // num_panels
            block, panel = divmod(unit - first_units[expert], num_panels)
            num_rows = starts[expert + 1] - starts[expert]
            row = starts[expert] + share(num_rows, block, num_blocks)
            count = starts[expert] + share(num_rows, block + 1, num_blocks) - row
            rows = x.ctypes.data + row * depth * 4
            own_sums = sums.ctypes.data + row * num_groups * 4
            target = out + row * num_columns * 4
            if is_first:
                pair = np.empty((count, 2 * PANEL), np.float32)
                for product in range(2):
                    place, stride = pair.ctypes.data + product * PANEL * 4, 2 * PANEL * 4
                    own = tables[expert, product]
                    multiply_quantized(rows, own_sums, own, place, stride, panel, count, *spaces)
                result = float32_array(target, (count, num_columns))
                silu_columns(pair, result, panel * PANEL)
            else:
                write_panel(rows, own_sums, tables[expert, 2], target, count, panel, spaces)
            unit = begin + next_index(counters.ctypes.data + owner * LINE)


@kernel
def quantized_experts(
    x, expert_ids, weights, tables, out, num_tokens, k, num_experts, hidden, size, num_threads, pool
):
    """As `Ops.experts`. tables: the fields of each expert's gate, up and down. Returns whether all
    experts are there; otherwise nothing is computed."""
    fields = int64_array(tables, (num_experts, 3, NUM_FIELDS))
    starts = np.zeros(num_experts + 1, np.int64)
    tokens = np.empty(num_tokens * k, np.int64)
    slots = np.empty((num_tokens, k), np.int64)
    if not sort_by_expert(int64_array(expert_ids, (num_tokens, k)), starts, tokens, slots):
        return False
    num_slots = starts[-1]
    source = float32_array(x, (num_tokens, hidden))
    rows = np.empty((num_slots, hidden), np.float32)
    for slot in range(num_slots):
        rows[slot] = source[tokens[slot]]
    inner = np.empty((num_slots, size), np.float32)
    results = np.empty((num_slots, hidden), np.float32)
    counters = np.zeros((num_threads, LINE // 8), np.int64)
    for phase in range(2):
        left, right = (inner, results) if phase else (rows, inner)
        num_panels = (right.shape[1] + PANEL - 1) // PANEL
        first_units = np.zeros(num_experts + 1, np.int64)
        count_units(starts, first_units, left.shape[1], num_panels)
        counters[:] = 0
        first = fields[0, 2 * phase]
        num_sums = num_slots if first[HAS_TERMS] else 0
        num_groups = left.shape[1] // first[GROUP]
        sums = sum_groups(left.ctypes.data, num_sums, num_groups, first[GROUP])
        is_first = phase == 0
        places = (left, fields, sums, right.ctypes.data, starts, first_units)
        spread(work, (is_first, *places, counters), num_threads, pool)
    outs = float32_array(out, (num_tokens, hidden))
    chosen = float32_array(weights, (num_tokens, k))
    adders = 1 if num_slots * hidden < PARALLEL_SUM else num_threads
    spread(sum_rows, (results, slots, chosen, outs), adders, pool)
    return True
