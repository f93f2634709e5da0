"""A circuit breaker: a server that does not answer is not asked for a while.

Closed: calls go through. After FAILURES_MAX in a row it opens: calls fail at once. When the pause
is over one call is let through (half-open); it closes the breaker, or doubles the pause up to
PAUSE_MAX_S. So a server that comes back is found within that time.
"""

from __future__ import annotations

import threading
import time

FAILURES_MAX = 3
PAUSE_MIN_S, PAUSE_MAX_S = 0.25, 2.0
PROBE_S = 5.0  # a probe that was not heard of for so long does not keep others from trying


class Breaker:
    """See the module docstring. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = PAUSE_MIN_S
        self._open_until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once now."""
        with self._lock:
            return self._failures >= FAILURES_MAX and time.monotonic() < self._open_until

    @property
    def is_failing(self) -> bool:
        """Whether the next call that is admitted is a probe."""
        with self._lock:
            return self._failures >= FAILURES_MAX

    def admits(self) -> bool:
        """Whether a call may be made; the first after a pause is the probe."""
        with self._lock:
            if self._failures < FAILURES_MAX:
                return True
            now = time.monotonic()
            if now < self._open_until:
                return False
            self._open_until = now + PROBE_S
            return True

    def succeeded(self) -> None:
        """The server answered."""
        with self._lock:
            self._failures, self._pause_s = 0, PAUSE_MIN_S

    def undecided(self) -> None:
        """The call ended before the server could answer: the next may be the probe."""
        with self._lock:
            self._open_until = min(self._open_until, time.monotonic())

    def failed(self) -> None:
        """It did not."""
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES_MAX:
                self._open_until = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
