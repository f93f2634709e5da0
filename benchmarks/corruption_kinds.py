"""Kinds of damage to a store nobody has open, and the files as they were before."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096


class Pristine:
    """The files of a store, to be put back. Folders keep their inodes: the memory tier's name has
    that of the store's."""

    def __init__(self, folder: Path, memory_dir: Path) -> None:
        self.folder = folder
        [self.live] = memory_dir.glob("prefixstore-*")
        self._kept = {
            path: path.read_bytes()
            for base in (folder, self.live)
            for path in base.rglob("*")
            if path.is_file() and path.name != "lock.mdb"
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
            "disk slots": [*self.folder.glob("*.slots")],
            "durable index": [self.folder / "index" / "data.mdb"],
            "live index": [self.live / "live" / "data.mdb"],
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


_PAGED = (flip, zero, scribble, truncate, swap, duplicate, remove)
_SMALL = (flip, scribble, truncate, remove)
KINDS = [
    *(
        Kind(place, work.__name__, work)
        for place in ("memory slots", "disk slots", "durable index", "live index")
        for work in _PAGED
    ),
    *(Kind(place, work.__name__, work) for place in ("settings", "markers") for work in _SMALL),
    Kind("markers", "reboot", keep_old),
]
