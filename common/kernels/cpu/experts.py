"""A mixture of experts on a CPU: each expert's tokens side by side, times its panels.

A token reads the weights of the experts that it chose and of no other. One token therefore moves
k experts' bytes, and a batch those of all experts that any of its tokens chose. So the work is cut
into (expert, panel) pieces of one parallel loop and not into one loop an expert: with few tokens each
expert is small, and waking the other cores for it would cost more than it does.

The panels of gate and up lie in turns, so that the activation of a panel's columns can follow at once,
while they are in the nearest cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.kernels.cpu.elementwise import exp32, share
from common.kernels.cpu.jit import float32_array, helper, int64_array, kernel, next_index
from common.kernels.cpu.linear import BLOCK, LINE, multiply_panel
from common.kernels.cpu.pool import spread
from common.kernels.cpu.vector import PANEL
from common.kernels.cpu.weight import WeightMemory, fill_panels

PARALLEL_SUM = 100_000  # elements from which a second core is worth its waking


@dataclass(frozen=True)
class PanelExperts:
    """A layer's experts as `experts` reads them."""

    gate_ups: list[Tensor]  # of each expert [size / PANEL rounded up, 2, hidden, PANEL]
    downs: list[Tensor]  # [hidden / PANEL rounded up, size, PANEL]
    addresses: Tensor  # [2, num_experts] int64
    zeros: Tensor  # in the place of a bias
    hidden: int
    size: int

    @classmethod
    def pack(cls, pairs: Iterable[tuple[Tensor, Tensor]], memory: WeightMemory) -> "PanelExperts":
        """pairs: gate_up and down of each expert. Raises ValueError for shapes that do not fit."""
        gate_ups, downs, shapes = [], [], set()
        for gate_up, down in pairs:
            hidden, size = down.shape
            shapes.add((hidden, size))
            gate_ups.append(memory.take(-(-size // PANEL), 2, hidden, PANEL))
            downs.append(memory.take(-(-hidden // PANEL), size, PANEL))
            fill_expert(gate_ups[-1], downs[-1], gate_up, down)
        if len(shapes) != 1:
            raise ValueError(
                f"experts: those of a layer are of one (hidden, size), not {sorted(shapes)}"
            )
        addresses = [[x.data_ptr() for x in tensors] for tensors in (gate_ups, downs)]
        zeros = torch.zeros(max(2, len(downs[0])) * PANEL)  # for gate and up, and for down
        return cls(gate_ups, downs, torch.tensor(addresses), zeros, hidden, size)

    def replace(self, index: int, gate_up: Tensor, down: Tensor) -> None:
        fill_expert(self.gate_ups[index], self.downs[index], gate_up, down)


def fill_expert(gate_ups: Tensor, downs: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Write one expert's weights into its panels. Raises ValueError for other shapes."""
    hidden, size = gate_ups.shape[2], downs.shape[1]
    if gate_up.shape != (2 * size, hidden) or down.shape != (hidden, size):
        raise ValueError(f"expert: gate_up {gate_up.shape}, down {down.shape}, not of {hidden=}")
    for i, half in enumerate(gate_up.chunk(2)):
        fill_panels(gate_ups[:, i], half)
    fill_panels(downs, down)


@helper
def sort_by_expert(expert_ids, starts, tokens, slots):
    """Give each (token, choice) a slot, those of one expert side by side.

    starts: zeros, [num_experts + 1]; becomes the first slot of each expert. tokens: of each slot.
    slots: of each (token, choice), -1 where the expert is not here. False if there is no such expert.
    """
    num_tokens, k = expert_ids.shape
    num_experts = len(starts) - 1
    for token in range(num_tokens):
        for choice in range(k):
            expert = expert_ids[token, choice]
            if expert >= num_experts:
                return False
            if expert >= 0:
                starts[expert + 1] += 1
    for expert in range(num_experts):
        starts[expert + 1] += starts[expert]
    free = starts.copy()
    for token in range(num_tokens):
        for choice in range(k):
            expert = expert_ids[token, choice]
            slots[token, choice] = -1
            if expert >= 0:
                slots[token, choice] = free[expert]
                tokens[free[expert]] = token
                free[expert] += 1
    return True


@helper
def count_units(starts, first_units, depth, num_panels):
    """The first unit of work of each expert, (block of rows, panel); first_units begins as zeros."""
    for expert in range(len(starts) - 1):
        count = starts[expert + 1] - starts[expert]
        num_blocks = max(1, count * depth // BLOCK) if count > 0 else 0
        first_units[expert + 1] = first_units[expert] + num_blocks * num_panels


@helper
def silu_columns(gate_up, out, begin):
    """silu(gate) * up of one panel's columns, to the columns of `out` from `begin` on."""
    width = min(PANEL, out.shape[1] - begin)
    for row in range(len(out)):
        for i in range(width):
            gate = gate_up[row, i]
            sigmoid = np.float32(1) / (np.float32(1) + exp32(-gate))
            out[row, begin + i] = gate * sigmoid * gate_up[row, PANEL + i]


@helper
def work(is_first, x, weights, zeros, out, starts, first_units, sizes, counters, thread, threads):
    """A thread's share of the units, then what is left of the others' (see `linear.work`).

    is_first: silu(gate) * up of the tokens' rows x, else the second product. sizes: columns of x,
    of out, and panels.
    """
    depth, num_columns, num_panels = sizes
    num_units = first_units[-1]
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
            rows, weight = x + row * depth * 4, weights[expert]
            target, width, first, num_products = out + row * num_columns * 4, num_columns, panel, 1
            pair = np.empty((count if is_first else 0, 2 * PANEL), np.float32)
            if is_first:
                weight += panel * 2 * depth * PANEL * 4
                target, width, first, num_products = pair.ctypes.data, 2 * PANEL, 0, 2
            for product in range(num_products):
                multiply_panel(rows, weight, zeros, target, first + product, count, depth, width)
            if is_first:
                place = float32_array(out + row * num_columns * 4, (count, num_columns))
                silu_columns(pair, place, panel * PANEL)
            unit = begin + next_index(counters.ctypes.data + owner * LINE)


@helper
def sum_rows(results, slots, weights, out, piece, num_pieces):
    """out[token] = the weighted sum of its slots' rows, for a piece of the tokens."""
    num_tokens, hidden = out.shape
    begin, end = share(num_tokens, piece, num_pieces), share(num_tokens, piece + 1, num_pieces)
    for token in range(begin, end):
        for i in range(hidden):
            out[token, i] = 0
        for choice in range(slots.shape[1]):
            slot, weight = slots[token, choice], weights[token, choice]
            if slot >= 0:
                for i in range(hidden):
                    out[token, i] += weight * results[slot, i]


@kernel
def experts(
    x,
    expert_ids,
    weights,
    addresses,
    zeros,
    out,
    num_tokens,
    k,
    num_experts,
    hidden,
    size,
    num_threads,
    pool,
):
    """As `Ops.experts`. addresses: of each expert's panels of gate and up, then of down. Returns
    whether all experts are there; otherwise nothing is computed."""
    tables = int64_array(addresses, (2, num_experts))
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
        depth, num_columns = left.shape[1], right.shape[1]
        num_panels = (num_columns + PANEL - 1) // PANEL
        first_units = np.zeros(num_experts + 1, np.int64)
        count_units(starts, first_units, depth, num_panels)
        counters[:] = 0
        own = tables[phase]
        sizes = (depth, num_columns, num_panels)
        places = (left.ctypes.data, own, zeros, right.ctypes.data, starts, first_units)
        spread(work, (phase == 0, *places, sizes, counters), num_threads, pool)
    outs = float32_array(out, (num_tokens, hidden))
    chosen = float32_array(weights, (num_tokens, k))
    adders = 1 if num_slots * hidden < PARALLEL_SUM else num_threads
    spread(sum_rows, (results, slots, chosen, outs), adders, pool)
    return True
