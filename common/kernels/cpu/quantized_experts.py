"""A mixture of quantised experts on a CPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.kernels.cpu.integer_weight import IntegerWeight
from common.kernels.cpu.quantized_weight import QuantizedPanels
from common.kernels.quantized import QuantizedWeight


@dataclass(frozen=True)
class QuantizedExperts:
    """A layer's experts: gate and up, and down, of each."""

    gate_ups: list[QuantizedPanels | IntegerWeight]
    downs: list[QuantizedPanels | IntegerWeight]
    hidden: int
    size: int

    @classmethod
    def pack(
        cls,
        pairs: Iterable[tuple[QuantizedWeight, QuantizedWeight]],
        prepare: Callable[[QuantizedWeight], QuantizedPanels | IntegerWeight],
    ) -> "QuantizedExperts":
        """pairs: gate_up and down of each expert. prepare: `Ops.prepare_weight`. Raises ValueError for shapes that do not fit."""
        gate_ups, downs, shapes = [], [], set()
        for gate_up, down in pairs:
            shapes.add(down.shape)
            check_shapes(gate_up, down, *down.shape)
            gate_ups.append(prepare(gate_up))
            downs.append(prepare(down))
        if len(shapes) != 1:
            raise ValueError(
                f"experts: those of a layer are of one (hidden, size), not {sorted(shapes)}"
            )
        return cls(gate_ups, downs, *shapes.pop())

    @property
    def num_bytes(self) -> int:
        return sum(panels.num_bytes for panels in self.gate_ups + self.downs)

    def replace(self, index: int, gate_up: QuantizedWeight, down: QuantizedWeight) -> None:
        check_shapes(gate_up, down, self.hidden, self.size)
        self.gate_ups[index].overwrite(gate_up)
        self.downs[index].overwrite(down)


def check_shapes(gate_up: QuantizedWeight, down: QuantizedWeight, hidden: int, size: int) -> None:
    if gate_up.shape != (2 * size, hidden) or down.shape != (hidden, size):
        raise ValueError(f"expert: gate_up {gate_up.shape}, down {down.shape}, not of {hidden=}")
