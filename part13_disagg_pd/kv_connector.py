"""What stands between an engine and another place where keys and values lie: one interface for all.

The names and contracts are those of vLLM's KVConnectorBase_V1. A connector has two sides. The
scheduler's side decides, in the engine's thread, and touches no tensor. The workers' side moves bytes.
Between them go plain numbers and strings: down in a step's `connector_meta`, up in what
`get_finished` returns. The host tier has an object for each side, and each implements its half; what
moves blocks between processes is both.

Keys and values come asynchronously here, always: a sequence that waits for them is LOADING, and other
sequences run. What does not come is computed.
"""

from typing import Any

import torch

from .block_cache import BlockCache
from .scheduler_output import SchedulerOutput
from .sequence import Sequence


class KVConnector:
    """Both sides of a connector. This one has nothing, and knows no other place."""

    # The scheduler's side.

    def on_new_request(self, sequence: Sequence) -> None:
        """A sequence has come into the queue."""

    def get_num_new_matched_tokens(self, sequence: Sequence, num_computed: int) -> int | None:
        """How many tokens beyond the first `num_computed`, which lie in the prefix cache, can be had from
        elsewhere; None: ask again later. It may be asked any number of times, and changes nothing."""
        return 0

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """The sequence's table has blocks for these tokens now: begin to bring them."""

    def build_connector_meta(self, output: SchedulerOutput) -> Any:
        """What the workers' side is to do in this step. Called once a step; what it returns is theirs."""

    def request_finished(self, sequence: Sequence) -> None:
        """The sequence has ended or was aborted, in whatever status, and has its blocks still. A
        connector that needs them becomes one more owner with `cache.hold`. (vLLM's returns whether
        blocks must not be freed yet; an owner of its own cannot be forgotten.)"""
