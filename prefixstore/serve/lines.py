"""Lines on standard error, written by a thread of their own.

What must hold: a reader that stalls, or is gone, holds up no request. Lines that find LINES_MAX
others waiting are dropped.
"""

from __future__ import annotations

import queue
import sys
import threading
from contextlib import suppress

LINES_MAX = 10_000
END_S = 1.0


class Lines:
    """`put` comes from one thread, and so does `close`."""

    def __init__(self) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue(LINES_MAX)
        self._thread = threading.Thread(target=self._run, name="prefixstore-lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Have it written soon."""
        with suppress(queue.Full):
            self._queue.put_nowait(line)

    def close(self) -> None:
        """Write what waits, as far as that takes no longer than END_S."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(END_S)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            with suppress(OSError, ValueError):  # nobody reads it any more
                print(line, file=sys.stderr, flush=True)
