"""Counters that several threads add to and one takes away."""

from __future__ import annotations

import threading
from collections import Counter


class Tally:
    """Named counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, by: int = 1) -> None:
        """Add to a count."""
        if by:
            with self._lock:
                self._counts[name] += by

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)
