"""Which chunks a pool has, as far as one process knows: so that most misses cost no round trip.

Made of listings and, where the engine can tell, of news of what was put since (`scout`). What must
hold: a chunk that is there may be taken for missing until the next listing, no longer: `may_have`
knows nothing when the last one is older than it may be, and then the engine is asked. A chunk that
has gone may be taken for there: the engine is asked about those in any case.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from prefixstore.keys import KEY_BYTES

KEYS_MAX = 4 << 20  # 32 MiB of them; an engine with more is asked every time
NEWS_MAX = 1 << 20  # put since the last listing
_NAMED_BYTES = 8  # of a key that are kept

Hashes = npt.NDArray[np.uint64]
_NONE: Hashes = np.empty(0, np.uint64)


class Known:
    """See the module docstring. Thread-safe."""

    def __init__(self, age_max_s: float) -> None:
        self._age_max_s = age_max_s
        self._lock = threading.Lock()
        self._listed: Mapping[bytes, Hashes] = {}
        self._valid_until = 0.0  # monotonic
        # Those that came during the last listing and before, and since it ended.
        self._news: dict[bytes, set[bytes]] = {}
        self._late_news: dict[bytes, set[bytes]] = {}
        self._overflow = False

    def may_have(self, namespace: bytes, keys: Sequence[bytes]) -> list[bool] | None:
        """Which chunks may be there; None: nobody knows."""
        with self._lock:
            if time.monotonic() > self._valid_until:
                return None
            listed = self._listed.get(namespace, _NONE)
            news = self._news.get(namespace, ())
            late = self._late_news.get(namespace, ())
            wanted = hashes_of(keys)
            at = np.searchsorted(listed, wanted)
            found = np.zeros(len(keys), np.bool_)
            inside = at < len(listed)
            found[inside] = listed[at[inside]] == wanted[inside]
            return [
                bool(there) or key in news or key in late
                for there, key in zip(found, keys, strict=True)
            ]

    def add(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """These were put."""
        with self._lock:
            there = self._late_news.setdefault(namespace, set())
            there.update(keys)
            if len(there) > NEWS_MAX:
                self._overflow, self._valid_until = True, 0.0
                there.clear()

    def listing_begins(self) -> None:
        """What was put before will be in the listing."""
        with self._lock:
            for namespace, keys in self._late_news.items():  # those before may not be in any yet
                self._news.setdefault(namespace, set()).update(keys)
            self._late_news, self._overflow = {}, False
            if sum(map(len, self._news.values())) > NEWS_MAX:  # no listing has ended for long
                self._news, self._valid_until = {}, 0.0

    def listed(self, names: Mapping[bytes, Hashes], began_s: float) -> None:
        """A listing that began at a (monotonic) time has ended; sorted hashes of each namespace."""
        with self._lock:
            self._listed = names
            self._news = {}
            self._valid_until = 0.0 if self._overflow else began_s + self._age_max_s

    def forget(self) -> None:
        """Something was missed: know nothing until the next listing."""
        with self._lock:
            self._valid_until = 0.0


def hashes_of(keys: Sequence[bytes | bytearray]) -> Hashes:
    """The part of each key that is kept; keys may stand in one."""
    data = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
    return np.ascontiguousarray(data[:, :_NAMED_BYTES]).view(np.uint64).ravel()
