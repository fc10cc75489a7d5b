"""Run the same work on several threads at once, and wait for what threads do."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable


def in_threads(work: Callable[[random.Random], None], count: int = 4, seconds: float = 120) -> None:
    """Run a function on each thread with its own generator; fails if one fails or doesn't end."""
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            work(random.Random(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    assert failures == []


def eventually(is_so: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether a condition becomes true."""
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.001)
    return is_so()
