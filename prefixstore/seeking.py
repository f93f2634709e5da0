"""Where the chunks of some stand in the eviction order, if many of others stand between them.

Who makes room among its own chunks looks for them from the coldest on, in a transaction for which
all other writers wait: at SWEEP_ROWS_MAX rows, no more. Where a look has not found enough by then,
the keeper walks on in pieces, in read transactions, for which nobody waits, and notes the coldest
NAMES_MAX it finds. Later looks begin with these, and go on behind them. A look that has met none
is the last until the walk has: there is no victim, and nothing is looked for in vain.

What must hold: names are hints, of this process alone. What comes to stand before them is seen once
the walk is made anew: each RENEW_S for as long as somebody looks (EMPTY_S if it found none), or
when they are not enough.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefixstore.config import SWEEP_ROWS_MAX
from prefixstore.index import Environment
from prefixstore.rows import Entry

if TYPE_CHECKING:
    from prefixstore.ledger import Ledger
    from prefixstore.quota import Whose

RENEW_S, EMPTY_S = 30.0, 2.0  # after a walk that has found some, and none
NAMES_MAX = 64
_PIECES = 8  # of SWEEP_ROWS_MAX rows, in one round of the keeper: .15 s of Python
_END = b"\xff"  # behind all names of table ``order``


@dataclass
class _Known:
    names: list[bytes]  # where looks begin; none: with the coldest of all
    walk: bytes | None  # where the walk goes on; None: it has ended
    found: list[bytes] = field(default_factory=list)  # by the walk so far
    ended: float = 0.0
    used: bool = True  # since the walk began

    def begin(self) -> None:
        """Walk from the coldest on."""
        self.walk, self.found, self.used = b"", [], False


class Places:
    """What looks begin with, by tier and whose chunks they are for. Looks are made by the index's
    writer thread, walks by the keeper: what one of them overwrites of the other's is a hint."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Whose], _Known] = {}

    def names(self, tier: int, of: Whose | None) -> list[bytes]:
        """Where in table ``order`` to look: at these, and from the last of them on."""
        known = None if of is None else self._known.get((tier, of))
        if known is None:
            return []
        known.used = True
        return known.names

    def stopped(self, tier: int, of: Whose | None, name: bytes, met: bool) -> None:
        """A look had to end at ``name``, or at the end, without enough; whether it has ``met``
        any."""
        if of is None:
            return
        known = self._known.get((tier, of))
        if known is None:  # it began with the coldest of all
            self._known[tier, of] = _Known([], b"") if met else _Known([_END], name)
        elif known.walk is None and known.names != [_END]:
            known.begin()  # from the coldest on: it began with names, and some may be before them
            known.names = known.names if met else [_END]

    def walk(self, ledger: Ledger, live: Environment) -> None:
        """Look on (keeper thread)."""
        pieces = _PIECES
        for at, known in list(self._known.items()):
            again_s = EMPTY_S if known.names == [_END] else RENEW_S
            if known.walk is None and time.monotonic() - known.ended >= again_s:
                if not known.used:
                    self._known.pop(at, None)
                    continue
                known.begin()
            tier, of = at
            while known.walk is not None and pieces > 0:
                pieces -= 1
                with live.read() as txn:
                    known.walk = _walked(ledger.coldest(txn, tier, [known.walk]), of, known.found)
                if known.walk is None:
                    known.names, known.ended = known.found or [_END], time.monotonic()


def _walked(rows: Iterator[tuple[bytes, Entry]], of: Whose, found: list[bytes]) -> bytes | None:
    """Walk a piece; where to go on, None: it is over."""
    for looked, (name, entry) in enumerate(rows):
        if looked == SWEEP_ROWS_MAX:
            return name
        if of(entry):
            found.append(name)
            if len(found) >= NAMES_MAX:
                return None
    return None
