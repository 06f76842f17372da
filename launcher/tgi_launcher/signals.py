"""Signals to the launcher as events of its one queue, and a closed terminal as the SIGHUP that it stands for.

Owns which signals count and noticing a hangup. What they lead to is decided in supervisor.py and fetch.py. Used by
launch.py.
"""

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Signals:
    """Puts one event per signal into the queue; the second one also acts at once."""

    def __init__(self, announce: Callable[[int], None]) -> None:
        """announce: called from the event loop with the number of every signal."""
        self._announce = announce
        self._count = 0
        self._ignores_hangup = False
        self._hung_up = False
        self.on_second: Callable[[], None] = lambda: None

    def install(self) -> None:
        """Call inside the event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._on_signal, number)
            elif number == signal.SIGHUP:
                self._ignores_hangup = True

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            if self._hung_up:
                return  # a closed terminal is noticed in two ways
            self._hung_up = True
        self._count += 1
        self._announce(number)
        if self._count > 1:
            self.on_second()

    @contextlib.contextmanager
    def terminal(self, stream: Any) -> Iterator[None]:
        """While entered, a hangup of the terminal that `stream` writes to counts as SIGHUP.

        The kernel sends SIGHUP to the leader of the terminal's session only: a shell passes it on, `make` as the
        leader (`ssh -t host make serve`) does not, and would wait for us for ever. A launcher in the background is
        left alone: whoever started it with `&` and `disown` wants it to outlive the terminal.
        """
        if self._ignores_hangup or not _in_foreground(stream):
            yield
            return
        loop = asyncio.get_running_loop()
        with select.epoll() as hangup:
            hangup.register(stream.fileno(), 0)  # no events asked for: it wakes up for a hangup only

            def on_hangup() -> None:
                loop.remove_reader(hangup.fileno())
                self._on_signal(signal.SIGHUP)

            loop.add_reader(hangup.fileno(), on_hangup)
            try:
                yield
            finally:
                loop.remove_reader(hangup.fileno())


def _in_foreground(stream: Any) -> bool:
    """Whether `stream` is a terminal and this process belongs to the job that runs in it."""
    try:
        return bool(stream.isatty()) and os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False  # closed, or not the terminal of this session
