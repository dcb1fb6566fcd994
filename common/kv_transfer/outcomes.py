"""What became of the prompts that a decode worker might have had computed, and where their time went.

asked --queue-- first layer of the first slice --prefill-- all computed --room-- blocks here
                                                           --transfer-- all is here
"""

from collections.abc import Mapping

from common.kv_transfer.fetching import Fetched

PHASES = ("queue", "prefill", "room", "transfer", "copying")


class Outcomes:
    """Counts and sums of seconds, one after the other; `copying` lies within them."""

    def __init__(self) -> None:
        names = (*(f"num_kv_{n}" for n in ("local", "fetched", "failed", "cancelled", "tokens")),)
        self.counts: dict[str, float] = dict.fromkeys(names, 0)
        self.counts |= dict.fromkeys((f"kv_seconds_{phase}" for phase in PHASES), 0.0)

    def local(self) -> None:
        """A prompt was too short, or too well known here, to ask for it."""
        self.counts["num_kv_local"] += 1

    def ended(self, fetched: Fetched, num_tokens: int) -> None:
        """So many tokens of a prompt have come; what was missing is computed here."""
        if fetched.error is not None:
            self.counts[
                "num_kv_cancelled" if fetched.error == "cancelled" else "num_kv_failed"
            ] += 1
            return
        self.counts["num_kv_fetched"] += 1
        self.counts["num_kv_tokens"] += num_tokens
        for phase, seconds in split(fetched.times).items():
            self.counts[f"kv_seconds_{phase}"] += seconds


def prefixed(name: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers of a sender or a receiver, to stand beside an engine's own."""
    return {f"{name}_{key}": value for key, value in numbers.items()}


def split(times: Mapping[str, float]) -> dict[str, float]:
    """How long each phase of a transfer took, in seconds."""
    computed = times.get("computed", times["ended"])
    ready = times.get("ready", computed)  # a sender may say at once that there is nothing to come
    begin = max(computed, times.get("fetch", computed))
    return {
        "queue": ready - times["requested"],
        "prefill": computed - ready,
        "room": begin - computed,
        "transfer": times["ended"] - begin,
        "copying": times["copying"],
    }
