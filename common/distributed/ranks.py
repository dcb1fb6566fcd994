"""The ranks of one engine, as one of them sees the others."""

import threading
from dataclasses import dataclass, field

import torch

from common.distributed.children import Children
from common.distributed.control import Control
from common.distributed.group import Group
from common.distributed.health import Health
from common.distributed.stages import Stages

LOAD_SECONDS = 1800.0  # that ranks which live may need longer than others to load


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
    timeout: float | None = None  # seconds that a wait may take once all have loaded
    # with ranks of other engines, or of some stages
    further_groups: list[Group] = field(default_factory=list)
    stages: Stages | None = None  # this rank's place, where they are divided into stages

    def divide(self, stages: Stages) -> None:
        """The ranks are stages of a pipeline."""
        self.stages = stages
        if stages.size > 1:
            groups = (stages.group, stages.before, stages.after, stages.back)
            self.further_groups += [group for group in groups if group is not None]

    def loaded(self) -> None:
        """All ranks are ready to work: until now one could wait long for another that was reading
        its weights, or compiling."""
        if self.timeout is not None:
            for group in (self.group, *self.further_groups):
                group.limit_waits(self.timeout)

    def problem(self) -> str | None:
        """One line on the first rank that has died or did not answer; None while all is well."""
        return self.health.problem

    def close(self) -> None:
        """End the ranks that were started here, and let go of everything. Raises nothing."""
        if self.children is not None:
            self.children.close()
            self.health.report("the ranks are closed")
        self.control.close()
        for group in (self.group, *self.further_groups):
            group.close()

    def close_soon(self) -> None:
        """`close` for a finalizer, which runs in any thread, perhaps in one that `close` waits for."""
        if self.size > 1:
            threading.Thread(target=self.close, name="closing ranks").start()
