"""Whether work in one thread lets the others run: Python's threads share one interpreter."""

import threading
import time
from collections.abc import Callable
from typing import Any


def longest_wait(work: Callable[[], Any]) -> float:
    """The longest time that another thread waited for its turn while `work` ran, as a share of the
    time that `work` took. (The event loop of a server is such a thread.)"""
    done = threading.Event()
    longest = 0.0

    def wait_often() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            last, before = time.perf_counter(), last
            longest = max(longest, last - before)

    other = threading.Thread(target=wait_often)
    other.start()
    time.sleep(0.01)
    begin = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - begin
        time.sleep(0.005)  # for the last wait to be seen
        done.set()
        other.join()
    return longest / seconds
