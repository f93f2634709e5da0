"""Kinds of damage to a store nobody has open, and the files as they were before.

Some are blind (any bytes of a file), some know the format and change one field of one record.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefixstore.layout import TRAILER_MAGIC
from prefixstore.ledger import ENTRY
from prefixstore.rows import NAMESPACE, ROW_HEAD_BYTES

PAGE = 4096
ENTRY_NAMESPACE = 16  # offset in an entry of the ledger
META_USED = 152  # bytes of a page that LMDB's meta page takes
# Fields of rows and of entries of the ledger, and where they are (docs/format.md).
ROW_FIELDS = {
    "version": (0, 1), "flags": (1, 1), "tag length": (2, 2), "depth": (4, 4), "slot": (8, 4),
    "slot_bytes": (12, 4), "created": (16, 4), "expires": (20, 4), "namespace": (24, 16),
    "salt": (40, 8), "trailer sum": (48, 16), "payload sum": (64, 16), "preimage": (80, 32),
}  # fmt: skip
ENTRY_FIELDS = {
    "slot_bytes": (0, 4), "slot": (4, 4), "depth": (8, 4), "expires": (12, 4),
    "namespace": (16, 16), "salt": (32, 8),
}  # fmt: skip


class Pristine:
    """The files of a store, to be put back. Folders keep their inodes: the memory tier's name has
    that of the store's."""

    def __init__(self, folder: Path, memory_dir: Path, namespace: bytes) -> None:
        self.folder, self.namespace = folder, namespace
        [self.live] = memory_dir.glob("prefixstore-*")
        self._kept = {
            path: path.read_bytes()
            for base in (folder, self.live)
            for path in base.rglob("*")
            if path.is_file()
        }

    def restore(self) -> None:
        """Put all files back, and remove what is new."""
        for base in (self.folder, self.live):
            base.mkdir(exist_ok=True)
            for path in base.rglob("*"):
                if path.is_file() and path not in self._kept:
                    path.unlink()
        for path, data in self._kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def paths(self, place: str) -> list[Path]:
        """The files of a place, and of them only those that hold something."""
        chosen = {
            "memory slots": [*self.live.glob("*.slots")],
            "memory trailers": [*self.live.glob("*.slots")],
            "disk slots": [*self.folder.glob("*.slots")],
            "disk trailers": [*self.folder.glob("*.slots")],
            "durable index": [self.folder / "index" / "data.mdb"],
            "durable rows": [self.folder / "index" / "data.mdb"],
            "live index": [self.live / "live" / "data.mdb"],
            "live rows": [self.live / "live" / "data.mdb"],
            "ledger": [self.live / "live" / "data.mdb"],
            "meta pages": [self.folder / "index" / "data.mdb", self.live / "live" / "data.mdb"],
            "lock tables": [self.folder / "index" / "lock.mdb", self.live / "live" / "lock.mdb"],
            "settings": [self.folder / "store.json"],
            "markers": [self.live / "incarnation", self.live / "origin", self.folder / "alive"],
        }[place]
        return [path for path in chosen if self._kept.get(path)]

    def used(self, path: Path, rng: random.Random, size: int = 1) -> int:
        """An offset in a file where something is: in slot files most is a hole."""
        data = self._kept[path]
        for _ in range(1000):
            at = rng.randrange(max(1, len(data) - size + 1))
            if any(data[at : at + max(size, 64)]):
                return at
        return 0

    def places_of(self, path: Path, what: bytes) -> list[int]:
        """Where some bytes are in a file."""
        return [found.start() for found in re.finditer(re.escape(what), self._kept[path])]

    def rows(self, path: Path) -> list[list[int]]:
        """Where rows begin in an index; those of one chunk together (LMDB leaves old pages)."""
        data, found = self._kept[path], dict[bytes, list[int]]()
        for place in self.places_of(path, self.namespace):
            start = place - NAMESPACE.start
            if start >= 0 and data[start] == 1 and data[start + 2 : start + 4] == bytes(2):
                name = data[start + ROW_HEAD_BYTES : start + ROW_HEAD_BYTES + 32]
                found.setdefault(name, []).append(start)
        return list(found.values())

    def entries(self, path: Path) -> list[list[int]]:
        """Where the ledger's entries begin, those of one chunk and tier together."""
        data, found = self._kept[path], dict[bytes, list[int]]()
        for place in self.places_of(path, self.namespace):
            start = place - ENTRY_NAMESPACE
            key = data[start - 25 : start]  # behind it in a leaf: tier, rank, key
            if len(key) == 25 and key[0] in (1, 2) and int.from_bytes(key[1:3], "big") < 2:
                found.setdefault(key[:1] + key[9:], []).append(start)
        return list(found.values())


@dataclass(frozen=True)
class Kind:
    """One way of damaging one kind of place; ``damage`` says what it did."""

    place: str
    name: str
    _work: Callable[[Pristine, Path, random.Random], str]

    def damage(self, pristine: Pristine, rng: random.Random) -> str:
        """Do it, somewhere."""
        path = rng.choice(pristine.paths(self.place))
        return f"{path.name}: {self._work(pristine, path, rng)}"


def _overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def flip(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """One bit."""
    at, bit = pristine.used(path, rng), rng.randrange(8)
    _overwrite(path, at, bytes([path.read_bytes()[at] ^ 1 << bit]))
    return f"bit {bit} of byte {at} flipped"


def zero(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """A sector or a page, as by a write that was lost."""
    size = rng.choice((512, PAGE))
    at = pristine.used(path, rng) // size * size
    _overwrite(path, at, bytes(min(size, path.stat().st_size - at)))
    return f"{size} bytes at {at} zeroed"


def scribble(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """Some bytes of noise."""
    size = rng.choice((1, 8, 100, PAGE))
    at = pristine.used(path, rng)
    size = min(size, path.stat().st_size - at)
    _overwrite(path, at, rng.randbytes(size))
    return f"{size} bytes of noise at {at}"


def truncate(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """The end is missing."""
    size = rng.choice((0, pristine.used(path, rng), pristine.used(path, rng) // PAGE * PAGE))
    with path.open("r+b") as file:
        file.truncate(size)
    return f"cut to {size} bytes"


def swap(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """Two pages have changed places."""
    data = path.read_bytes()
    one, other = (pristine.used(path, rng) // PAGE * PAGE for _ in range(2))
    pages = data[one : one + PAGE], data[other : other + PAGE]
    _overwrite(path, one, pages[1])
    _overwrite(path, other, pages[0])
    return f"pages at {one} and {other} swapped"


def duplicate(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """A write that went to the wrong page as well."""
    data = path.read_bytes()
    one, other = (pristine.used(path, rng) // PAGE * PAGE for _ in range(2))
    _overwrite(path, other, data[one : one + PAGE])
    return f"page at {one} also at {other}"


def remove(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """The file is gone."""
    path.unlink()
    return "removed"


def keep_old(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """The live folder is gone, as after a reboot."""
    shutil.rmtree(pristine.live)
    return "the live folder removed"


def _slots(pristine: Pristine, path: Path, rng: random.Random) -> tuple[int, int, int]:
    """Two slots that hold something, and the size of a slot."""
    size = int(path.stem.partition("-")[2])
    one, other = (pristine.used(path, rng) // size * size for _ in range(2))
    return one, other, size


def swap_slots(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """Two slots, each with its trailer, have changed places."""
    one, other, size = _slots(pristine, path, rng)
    data = path.read_bytes()
    _overwrite(path, other, data[one : one + size])
    _overwrite(path, one, data[other : other + size])
    return f"slots at {one} and {other} swapped"


def duplicate_slot(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """A slot was written where another one is, too."""
    one, other, size = _slots(pristine, path, rng)
    _overwrite(path, other, path.read_bytes()[one : one + size])
    return f"slot at {one} also at {other}"


def swap_trailers(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """The checksums of two slots have changed places."""
    one, other = (rng.choice(pristine.places_of(path, TRAILER_MAGIC)) for _ in range(2))
    data = path.read_bytes()
    _overwrite(path, other, data[one : one + PAGE // 2])
    _overwrite(path, one, data[other : other + PAGE // 2])
    return f"trailers at {one} and {other} swapped"


def _change(path: Path, places: list[int], size: int, rng: random.Random) -> str:
    """A bit, or all, of some bytes that stand at several places."""
    before = path.read_bytes()[places[0] : places[0] + size]
    way = rng.choice(("flip", "noise", "zero", "ones"))
    if way == "flip":
        bit = rng.randrange(8 * size)
        after = (int.from_bytes(before, "little") ^ 1 << bit).to_bytes(size, "little")
    else:
        after = {"noise": rng.randbytes(size), "zero": bytes(size), "ones": b"\xff" * size}[way]
    for place in places:
        _overwrite(path, place, after)
    return f"{way}, {before.hex()} to {after.hex()} at {places}"


def change_trailer(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """Magic, key or checksums of a slot."""
    place = rng.choice(pristine.places_of(path, TRAILER_MAGIC)) + 8 * rng.randrange(12)
    return _change(path, [place], rng.choice((1, 8)), rng)


def change_row(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """One field of one row."""
    name = rng.choice(list(ROW_FIELDS))
    at, size = ROW_FIELDS[name]
    places = [start + at for start in rng.choice(pristine.rows(path))]
    return f"{name}: {_change(path, places, size, rng)}"


def change_entry(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """One field of what the ledger knows of a chunk, or its length."""
    name = rng.choice([*ENTRY_FIELDS, "length"])
    starts = rng.choice(pristine.entries(path))
    if name == "length":  # of the value, in the head of LMDB's node: the key is between them
        for start in starts:
            _overwrite(path, start - 25 - 8, (ENTRY.size - 1).to_bytes(2, "little"))
        return f"length at {starts}"
    at, size = ENTRY_FIELDS[name]
    return f"{name}: {_change(path, [start + at for start in starts], size, rng)}"


def change_meta(pristine: Pristine, path: Path, rng: random.Random) -> str:
    """Something in the pages from which LMDB goes to all others: one, or both."""
    pages = rng.choice(([0], [PAGE], [0, PAGE]))
    at, size = rng.randrange(META_USED), rng.choice((1, 2, 8))
    return _change(path, [page + at for page in pages], size, rng)


_PAGED = (flip, zero, scribble, truncate, swap, duplicate, remove)
_SMALL = (flip, scribble, truncate, remove)
KINDS = [
    *(
        Kind(place, work.__name__, work)
        for place in ("memory slots", "disk slots", "durable index", "live index")
        for work in _PAGED
    ),
    *(
        Kind(f"{tier} {place}", work.__name__, work)
        for tier in ("memory", "disk")
        for place, works in (
            ("slots", (swap_slots, duplicate_slot)),
            ("trailers", (swap_trailers, change_trailer)),
        )
        for work in works
    ),
    Kind("durable rows", "change_row", change_row),
    Kind("live rows", "change_row", change_row),
    Kind("ledger", "change_entry", change_entry),
    Kind("meta pages", "change_meta", change_meta),
    *(Kind("lock tables", work.__name__, work) for work in _SMALL),
    *(Kind(place, work.__name__, work) for place in ("settings", "markers") for work in _SMALL),
    Kind("markers", "reboot", keep_old),
]
