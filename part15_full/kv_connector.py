"""What stands between an engine and any other place where keys and values lie: one interface for all.

Names and contracts are those of vLLM's KVConnectorBase_V1. A connector has two sides. The scheduler's
decides; it lives in the engine's thread and touches no tensor. The workers' moves bytes; `start_load_kv`
and what is called per layer come in the device's order. Between them go plain numbers and strings: down
in a step's `connector_meta`, up in what `get_finished` returns. The host tier has an object for each
side (`offload.py`, and `BlockCopies` of `common.kv_store`); what moves blocks between processes is both
in one (`disaggregation.py`).

Three contracts differ from vLLM's. Keys and values always come while other sequences run, so no layer
waits for a load (no `wait_for_layer_load`). What has come is told as a count of tokens, so a block that
failed has no list of its own (no `get_block_ids_with_load_errors`). And a connector that needs blocks
beyond their sequence's life becomes one more owner of them (`cache.hold`), so `request_finished` need not
say that freeing is to be delayed.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from common.kv_transfer.ticket import Ticket, accept_ticket
from common.requests import Request

from .block_cache import BlockCache
from .sequence import Sequence

if TYPE_CHECKING:
    from .scheduler import SchedulerOutput


class KVConnector:
    """Both sides. This one knows no other place."""

    is_busy = will_free = False  # transfers are under way; blocks come free when these are done
    num_copied, pairs = 0, ()  # what other ranks must have copied before a step; host caches
    role, address, secret = "both", None, None  # what it is to other workers

    # the scheduler's side

    def bind_block_cache(self, cache: BlockCache) -> None:
        """cache: where the sequences' blocks come from."""
        self.cache = cache

    def on_new_request(self, sequence: Sequence) -> None:
        """A sequence has come to the queue."""

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens of a sequence can be had from here beyond those that the device has, and
        whether they come while steps go on. None: that is not known yet. Nothing is changed."""
        return 0, False

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """A sequence has blocks for all of its tokens: bring the keys and values of so many, behind
        those that are computed, or of none."""

    def build_connector_meta(self, output: "SchedulerOutput") -> list[Any]:
        """What the workers' side is to do, from before this step on."""
        return []

    def update_connector_output(self, finished: Iterable[Any]) -> list[tuple[Sequence, int]]:
        """What `get_finished` has returned. Returns sequences, and how many of their tokens have come:
        fewer than were to come where something has failed; the rest is computed."""
        return []

    def request_preempted(self, sequence: Sequence) -> bool:
        """A sequence is about to lose its blocks, and will come back. Returns whether its keys and
        values are kept."""
        return False

    def request_finished(self, sequence: Sequence) -> None:
        """A sequence has ended, whatever its status, and may be about to lose its blocks."""

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long on the device."""

    def drop(self) -> None:
        """End what is under way with other workers, and what waits for them."""

    def forget(self) -> None:
        """What lies elsewhere is not to be found any more."""

    def held(self) -> list[list[int]]:
        """Device blocks that transfers own."""
        return []

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""

    def stats(self) -> dict[str, Any]:
        return {}

    # the workers' side

    def start_load_kv(self, meta: list[Any]) -> None:
        """Begin what a step's `build_connector_meta` has asked for, when the device has done what it was
        given until now."""

    def save_kv_layer(self, layer: int) -> None:
        """The step that runs has written its keys and values of this layer. They are told at once, so no
        step waits for it (no `wait_for_save`)."""

    def get_finished(self) -> list[Any]:
        """Transfers that are done since the last time."""
        return []

    def wait(self, seconds: float) -> None:
        """Return when a transfer is done, or after some time."""

    def shutdown(self) -> None:
        """End what is under way."""

    # towards other workers

    def serve(self, add: Callable[[Request], None], abort: Callable[[str], None]) -> None:
        """Let others ask for prompts: they are put into the engine with `add`, which raises ValueError,
        and taken out with `abort`; both may be called in any thread."""

    def describe(self) -> dict[str, Any]:
        """What a proxy must know of this worker."""
        return {"role": self.role, "address": self.address}

    def ticket_of(self, header: str | None) -> Ticket | None:
        """Where a request's prompt may be computed, as its header says; None: here."""
        return accept_ticket(header, self.secret)
