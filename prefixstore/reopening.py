"""Opening a store again that was lost: its folder was replaced, or its index had an I/O error.

For whoever goes on without it meanwhile: the connector, the server. A store says by itself that it
is lost (`Store.gone`), within a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from prefixstore.interface import StoreLike

S = TypeVar("S", bound=StoreLike)


class Reopener(Generic[S]):
    """Opens a store, and again; a trouble that lasts is logged once. Used on one thread."""

    def __init__(self, open_it: Callable[[], S], where: str, warn: Callable[[str], None]) -> None:
        self._open, self._where, self._warn = open_it, where, warn
        self._complained = ""

    def again(self, lost: S | None) -> S | None:
        """Close what was lost, and open the store; None if that cannot be done now."""
        try:
            if lost is not None:
                lost.close()  # before: one whose index had an error can be opened once only
            store = self._open()
        except Exception as error:  # thread loop: whatever is wrong, who asks goes on without it
            if str(error) != self._complained:
                self._warn(f"serving without the store: {error}")
                self._complained = str(error)
            return None
        if self._complained or lost is not None:
            self._warn(f"the store {self._where} is usable again")
            self._complained = ""
        return store
