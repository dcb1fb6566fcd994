"""Whether lost tokens are sooner copied or computed: what either took lately."""


class Rates:
    """Seconds for a block's copy and for a token's computation, as sums that fade."""

    def __init__(self) -> None:
        self.copied = self.computed = (0.0, 0.0)  # seconds, and blocks or tokens
        self.largest = 0  # tokens of a step

    def observe_copy(self, num_blocks: int, seconds: float) -> None:
        self.copied = fade(self.copied, seconds, num_blocks)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Lost tokens are computed in large steps: small ones do not count."""
        self.largest = max(self.largest, num_tokens)
        if 2 * num_tokens >= self.largest:
            self.computed = fade(self.computed, seconds, num_tokens)

    def swap_pays(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether so many blocks are copied out and in sooner than their tokens are computed again.
        A copy that was never measured costs nothing."""
        copy_seconds, copied = self.copied
        step_seconds, computed = self.computed
        if not copied or not computed:
            return True
        return 2 * num_blocks * copy_seconds / copied < num_tokens * step_seconds / computed


def fade(sums: tuple[float, float], seconds: float, count: int) -> tuple[float, float]:
    return 0.9 * sums[0] + seconds, 0.9 * sums[1] + count
