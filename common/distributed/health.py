"""What is wrong with the ranks, known to all that wait for one."""

import re
import threading
import time
from collections.abc import Callable

from common.distributed.group import RankError

GRACE = 0.5  # seconds for the watcher of processes to say why a connection has ended


class Health:
    """The first problem of some ranks, as one line; None while there is none.

    It is reported by whatever notices first (a wait, the watcher of the processes), in any thread.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self.state_of: Callable[[int], str | None] = lambda rank: None  # of a rank's process
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call this, in a thread of its own, when the first problem is reported."""
        self._callbacks.append(callback)

    def report(self, problem: str) -> RankError:
        """Keep a problem, unless there is one already. Returns the first as an error to raise."""
        with self._lock:
            is_first = self.problem is None
            self.problem = self.problem or problem
        for callback in self._callbacks if is_first else ():
            threading.Thread(target=callback, name="rank lost", daemon=True).start()
        return RankError(self.problem)

    def report_silence(self, rank: int, problem: str) -> RankError:
        """`report` of a rank that may be alive, with what the system says of its process."""
        state = self.state_of(rank)
        return self.report(f"{problem} ({state})" if state else problem)

    def report_after_grace(self, problem: str) -> RankError:
        """The same for a connection that has ended: the watcher may know better why."""
        deadline = time.monotonic() + GRACE
        while self.problem is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.report(problem)

    def check(self) -> None:
        """Raises RankError when a problem is known."""
        if self.problem is not None:
            raise RankError(self.problem)


def reason_of(error: BaseException) -> str:
    """The first line of a PyTorch error, without the place in its source and the advice."""
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^\[\S+\] |\. This is typically.*$", "", line)
