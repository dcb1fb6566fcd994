"""The ranks of one engine, as one of them sees the others."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common.distributed.children import Children
from common.distributed.control import Control
from common.distributed.group import Group
from common.distributed.health import Health


@dataclass
class Ranks:
    """What a rank knows of its engine's ranks.

    `group` carries tensors; `control` what rank 0 tells the others. `device` is this rank's own,
    `threads` its share of the host's cores.
    """

    rank: int
    size: int
    group: Group
    control: Control
    device: torch.device
    threads: int
    health: Health = field(default_factory=Health)
    children: Children | None = None
    at_close: list[Callable[[], None]] = field(default_factory=list)  # the last first

    def problem(self) -> str | None:
        """One line on the first rank that has died or did not answer; None while all is well."""
        return self.health.problem

    def close(self) -> None:
        """End the ranks that were started here, and let go of everything. Raises nothing."""
        while self.at_close:
            self.at_close.pop()()
        if self.children is not None:
            self.children.close()
            self.health.report("the ranks are closed")
        self.control.close()
        self.group.close()
