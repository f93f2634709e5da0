"""Which chunks the device tier keeps: who comes in, who goes. Arithmetic only; not thread-safe.

Algorithm: S3-FIFO (Yang et al., SOSP 2023) with a small queue that holds names and no bytes, since
what is loaded once can be had from the store as well: a chunk is admitted when it is loaded again
while its name is still among the last ones that were loaded and not here. So prompts that come once
cost no copy and push nothing out. The main queue is first in, first out, but what was used since it
came or was last looked at goes to the back instead, up to USES_MAX times.

What must hold: a slot has one chunk or none; one that is being read is neither evicted nor free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from connector.tally import Tally

USES_MAX = 3


@dataclass(eq=False, slots=True)
class Resident:
    """A chunk in a slot."""

    slot: int
    uses: int = 0
    readers: int = 0
    gone: bool = False  # its slot is free when nobody reads it any more


class Residents:
    """Of ``num_slots`` slots. Chunks go by name; ``counts`` is told what comes and goes."""

    def __init__(self, num_slots: int, counts: Tally) -> None:
        self._ghosts_max, self._counts = num_slots, counts
        self._free = list(range(num_slots - 1, -1, -1))
        self._main: OrderedDict[Hashable, Resident] = OrderedDict()
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()  # loaded, and not here

    def take(self, names: Sequence[Hashable]) -> tuple[dict[int, Resident], set[int]]:
        """What one load asks for: by their place in ``names`` the chunks that are here, to be read
        until `give_back`, and the places of those that should be admitted once they are loaded."""
        found: dict[int, Resident] = {}
        wanted: set[int] = set()
        before: set[Hashable] = set()  # a text may stand in one prompt twice
        for place, name in enumerate(names):
            held = self._main.get(name)
            if held is not None:
                held.readers += 1
                found[place] = held
                if name not in before:
                    held.uses = min(held.uses + 1, USES_MAX)
            elif name not in before:
                if name in self._ghosts:
                    wanted.add(place)
                else:
                    self._ghosts[name] = None
                    if len(self._ghosts) > self._ghosts_max:
                        self._ghosts.popitem(last=False)
            before.add(name)
        self._counts.add("device_chunks_hit", len(found))
        return found, wanted

    def give_back(self, taken: Iterable[Resident]) -> None:
        """Those are not read any more."""
        for held in taken:
            held.readers -= 1
            if held.gone and not held.readers:
                self._free.append(held.slot)

    def place(self, name: Hashable) -> int | None:
        """A slot for a chunk, to be filled and then entered or freed; None if it is here by now,
        or all others are being read."""
        if name in self._main:
            return None
        if self._free:
            return self._free.pop()
        if all(held.readers for held in self._main.values()):
            return None
        while True:  # at most USES_MAX + 1 times around
            oldest, held = next(iter(self._main.items()))
            if not (held.readers or held.uses):
                break
            held.uses = max(held.uses - 1, 0)
            self._main.move_to_end(oldest)
        del self._main[oldest]
        self._counts.add("device_chunks_evicted")
        return held.slot

    def enter(self, name: Hashable, slot: int) -> None:
        """The slot is filled."""
        self._ghosts.pop(name, None)
        self._main[name] = Resident(slot)
        self._counts.add("device_chunks_admitted")

    def free(self, slot: int) -> None:
        """It was not filled."""
        self._free.append(slot)

    def drop(self, name: Hashable, held: Resident) -> None:
        """What is in that slot is damaged. Call it while the slot is being read."""
        if not held.gone:
            held.gone = True
            del self._main[name]
            self._counts.add("device_chunks_damaged")
