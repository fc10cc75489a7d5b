"""Run the same work on several threads at once."""

from __future__ import annotations

import random
import threading
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
