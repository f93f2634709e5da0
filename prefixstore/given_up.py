"""Chunks that could not be written to disk: how many of each namespace, and who was told.

A flush says of its own only, and once: a tenant of a server must not be told of another's, nor have
another be told instead.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable


class GivenUp:
    """See the module docstring. Thread-safe."""

    def __init__(self) -> None:
        self._lost: Counter[bytes] = Counter()
        self._told: Counter[bytes] = Counter()
        self._told_of_all: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def add(self, namespaces: Iterable[bytes]) -> None:
        """One chunk of each was given up."""
        with self._lock:
            self._lost.update(namespaces)

    def tell_of_all(self) -> bool:
        """Whether none had to be given up of which neither this nor `tell` has told; who has yet to
        be told of its own is told all the same."""
        with self._lock:
            told, self._told_of_all = self._told | self._told_of_all, self._lost.copy()
            return self._lost <= told

    def told(self) -> Counter[bytes]:
        """How many were told of, for `tell`."""
        with self._lock:
            return self._told.copy()

    def tell(self, told: Counter[bytes], owns: Callable[[bytes], bool]) -> bool:
        """Whether none had to be given up, of the namespaces asked for, since ``told`` were told
        of; now it is known."""
        with self._lock:
            lost = self._lost.copy()
        news = {name: count for name, count in lost.items() if count > told[name] and owns(name)}
        with self._lock:
            self._told |= Counter(news)
        return not news
