"""Threads for work that releases the interpreter lock and, at worst, never ends. Used by masks.py.

Not a ThreadPoolExecutor: that one waits for its threads when the process ends.
"""

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Piece:
    """A piece of work under way."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._done = threading.Event()
        self._started = False
        self._given_up = False

    def wait(self, timeout_s: float) -> bool:
        """Whether it is done, after at most `timeout_s`."""
        return self._done.wait(timeout_s)

    def give_up(self) -> bool:
        """Nobody waits any more: it is not started when it has not been. Whether it keeps a thread all the same."""
        self._given_up = True
        return self._started and not self._done.is_set()

    def run(self) -> bool:
        """Returns whether its thread may go on to others."""
        self._started = True
        try:
            if not self._given_up:
                self._work()
        except Exception:
            logger.exception("a piece of work failed; whoever waits for it sees no result")
        finally:
            self._done.set()
        return not self._given_up


class Workers:
    """Starts its threads when the first work comes."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._queue: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._running = 0

    def submit(self, work: Callable[[], None]) -> Piece:
        """Work that handles its own exceptions."""
        while self._running < self._num_threads:
            self._start_one()
        piece = Piece(work)
        self._queue.put(piece)
        return piece

    def replace_one(self) -> None:
        """One thread is held by work that was given up; it ends when that does."""
        self._start_one()

    def _start_one(self) -> None:
        self._running += 1
        threading.Thread(target=self._run, name="grammar", daemon=True).start()

    def _run(self) -> None:
        while self._queue.get().run():
            pass
