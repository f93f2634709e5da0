"""Where the chunks of some stand in the eviction order, if many of others stand before them.

Who makes room among its own chunks looks for them from the coldest on, in a transaction for which
all other writers wait: at SWEEP_ROWS_MAX rows, no more. One that has met none of its own is noted
here. The keeper walks on from there in pieces, in read transactions, for which nobody waits, and
the next look begins at what the walk has found. Until then there is no victim.

What must hold: a place is a hint, of this process alone. What comes to stand before it is seen once
the walk is made anew, each RENEW_S for as long as somebody looks from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefixstore.config import SWEEP_ROWS_MAX
from prefixstore.index import Environment
from prefixstore.rows import Entry

if TYPE_CHECKING:
    from prefixstore.ledger import Ledger
    from prefixstore.quota import Whose

RENEW_S = 30.0
_PIECES = 16  # of SWEEP_ROWS_MAX rows, in one round of the keeper
_END = b"\xff"  # behind all names of table ``order``


@dataclass
class _Place:
    start: bytes  # where a look begins
    walk: bytes | None  # where the walk goes on; None: it has ended
    ended: float = 0.0
    used: bool = True  # since the walk began


class Places:
    """Where looks begin and walks go on, by tier and whose chunks they are for. Looks are made by
    the index's writer thread, walks by the keeper: what one of them overwrites is a hint."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Whose], _Place] = {}

    def start(self, tier: int, of: Whose | None) -> bytes:
        """Where in table ``order`` to look for chunks."""
        place = None if of is None else self._known.get((tier, of))
        if place is None:
            return b""
        place.used = True
        return place.start

    def stopped(self, tier: int, of: Whose, name: bytes) -> None:
        """A look has come as far as ``name``, where it had to end, and met none."""
        self._known[tier, of] = _Place(_END, name)

    def walk(self, ledger: Ledger, live: Environment) -> None:
        """Look on (keeper thread)."""
        pieces = _PIECES
        for at, place in list(self._known.items()):
            if place.walk is None and time.monotonic() - place.ended >= RENEW_S:
                if not place.used:
                    self._known.pop(at, None)
                    continue
                place.walk, place.used = b"", False
            tier, of = at
            while place.walk is not None and pieces > 0:
                pieces -= 1
                with live.read() as txn:
                    name, over = _walked(ledger.coldest(txn, tier, place.walk), of)
                if over:
                    place.start, place.walk, place.ended = name, None, time.monotonic()
                else:
                    place.walk = name


def _walked(rows: Iterator[tuple[bytes, Entry]], of: Whose) -> tuple[bytes, bool]:
    """How far a walk comes in one piece, and whether it is over."""
    for looked, (name, entry) in enumerate(rows):
        if of(entry):
            return name, True
        if looked == SWEEP_ROWS_MAX:
            return name, False
    return _END, True
