"""What may be on a disk when the power goes: recorded writes, of which unsynced ones may be lost.

A write is sure once its file was synced after it (fsync, fdatasync), or at once if the file was
opened with O_DSYNC. One that is not sure may be there, be lost, or be there in part: sectors of
512 bytes, or pages, each or not. So newer ones may be there without older ones. The length of a
file may have grown without its bytes (zeros then). The same goes for names: a file that was made,
renamed or removed is so for sure once its folder was synced after it; what was done to one folder
since comes in order, folders are independent. This is POSIX, and less than ext4 or XFS promise.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

(WRITE, SYNC, TRUNCATE, EXTEND, ZERO, CREATE, MKDIR, RENAME, UNLINK, SYNC_FOLDER) = range(1, 11)
_RECORD = struct.Struct("<IIQqQ")
SECTOR, PAGE = 512, 4096
_FOLDER = -1
CHOICES = ("all lost", "all kept", "some lost", "torn in pages", "torn in sectors")


class Record(NamedTuple):
    """One call."""

    kind: int
    sure: bool
    inode: int
    offset: int
    data: bytes


def records_of(log: bytes) -> Iterator[Record]:
    """The calls in the order they were made."""
    at = 0
    while at < len(log):
        kind, sure, inode, offset, length = _RECORD.unpack_from(log, at)
        at += _RECORD.size
        # These say by their length what the others say by their data.
        size = 0 if kind in (SYNC, TRUNCATE, EXTEND) else length
        yield Record(kind, bool(sure), inode, offset, log[at : at + size])
        at += size


@dataclass
class File:
    """The bytes that are sure, and what was done since."""

    sure: bytearray = field(default_factory=bytearray)
    since: list[Record] = field(default_factory=list)


@dataclass
class Folder:
    """The names that are sure, and what was done since: (name, what it names or None)."""

    sure: dict[str, int] = field(default_factory=dict)
    since: list[tuple[tuple[str, int | None], ...]] = field(default_factory=list)

    def names(self, count: int) -> dict[str, int]:
        """The names if so many of the last changes are there."""
        names = dict(self.sure)
        for changes in self.since[:count]:
            for name, what in changes:
                if what is None:
                    names.pop(name, None)
                else:
                    names[name] = what
        return names


class Disk:
    """The files below a folder, as far as records were applied."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.files: list[File] = []
        self.folders: dict[str, Folder] = {"": Folder()}
        self.by_inode: dict[int, int] = {}

    def _split(self, path: bytes) -> tuple[str, str]:
        relative = path.decode().removeprefix(self.root).strip("/")
        folder, _, name = relative.rpartition("/")
        return folder, name

    def apply(self, record: Record) -> None:
        """One more call was made."""
        kind = record.kind
        if kind in (WRITE, TRUNCATE, EXTEND, ZERO):
            self.files[self.by_inode[record.inode]].since.append(record)
        elif kind == SYNC:
            file = self.files[self.by_inode[record.inode]]
            for done in file.since:
                _do(file.sure, done)
            file.since.clear()
        elif kind == SYNC_FOLDER:
            folder = self.folders["/".join(filter(None, self._split(record.data)))]
            folder.sure, folder.since = folder.names(len(folder.since)), []
        else:
            self._rename(record)

    def _rename(self, record: Record) -> None:
        if record.kind == RENAME:
            one, other = record.data.split(b"\0")
            (parent, old), (target, new) = self._split(one), self._split(other)
            assert parent == target, "a file that changes its folder"
            folder = self.folders[parent]
            what = folder.names(len(folder.since))[old]
            folder.since.append(((old, None), (new, what)))
            for path in [path for path in self.folders if _is_below(path, parent, old)]:
                moved = (
                    "/".join(filter(None, (parent, new)))
                    + path[len(f"{parent}/{old}".strip("/")) :]
                )
                self.folders[moved] = self.folders.pop(path)
            return
        parent, name = self._split(record.data)
        folder = self.folders[parent]
        if record.kind == CREATE:
            self.by_inode[record.inode] = len(self.files)
            folder.since.append(((name, len(self.files)),))
            self.files.append(File())
        elif record.kind == MKDIR:
            self.folders["/".join(filter(None, (parent, name)))] = Folder()
            folder.since.append(((name, _FOLDER),))
        else:
            folder.since.append(((name, None),))

    def name_of(self, inode: int) -> str:
        """The name a file in the top folder has now; "" for others."""
        top = self.folders[""]
        number = self.by_inode[inode]
        return next((n for n, what in top.names(len(top.since)).items() if what == number), "")

    def after_power_loss(self, target: Path, rng: random.Random, choice: str) -> None:
        """Write into an empty folder what is there when the power goes now."""
        self._write_folder("", target, rng, choice)

    def _write_folder(self, path: str, target: Path, rng: random.Random, choice: str) -> None:
        folder = self.folders[path]
        most = len(folder.since)
        kept = {"all lost": 0, "all kept": most}.get(choice, rng.randint(0, most))
        for name, what in folder.names(kept).items():
            if what == _FOLDER:
                (target / name).mkdir()
                self._write_folder(f"{path}/{name}".strip("/"), target / name, rng, choice)
            else:
                _write_sparse(target / name, _survivor(self.files[what], rng, choice))


def _is_below(path: str, parent: str, name: str) -> bool:
    whole = f"{parent}/{name}".strip("/")
    return path == whole or path.startswith(whole + "/")


def _do(content: bytearray, record: Record) -> None:
    """Do to a file what was recorded."""
    at = record.offset
    if record.kind == WRITE:
        _grow(content, at + len(record.data))
        content[at : at + len(record.data)] = record.data
    elif record.kind == TRUNCATE:
        del content[at:]
        _grow(content, at)
    elif record.kind == EXTEND:
        _grow(content, at)
    else:
        stop = min(len(content), at + int.from_bytes(record.data, "little"))
        content[at:stop] = bytes(max(0, stop - at))


def _grow(content: bytearray, size: int) -> None:
    content.extend(bytes(max(0, size - len(content))))


def _survivor(file: File, rng: random.Random, choice: str) -> bytearray:
    """What is left of a file."""
    content = bytearray(file.sure)
    for record in file.since:
        if record.sure or choice == "all kept":
            _do(content, record)
        elif choice == "all lost":
            continue
        elif record.kind == WRITE and choice.startswith("torn"):
            unit = PAGE if choice == "torn in pages" else SECTOR
            at = record.offset
            while at < (stop := record.offset + len(record.data)):
                to = min(stop, at // unit * unit + unit)  # a sector is written whole or not at all
                if rng.random() < 0.5:
                    part = record.data[at - record.offset : to - record.offset]
                    _do(content, record._replace(offset=at, data=part))
                at = to
            if rng.random() < 0.5:
                _grow(content, stop)
        elif rng.random() < 0.5:
            _do(content, record)
    return content


def _write_sparse(path: Path, content: bytearray) -> None:
    """Pages of zeros take no space: what was given back was."""
    with open(path, "wb", buffering=0) as file:
        file.truncate(len(content))
        for at in range(0, len(content), PAGE):
            part = content[at : at + PAGE]
            if part.count(0) != len(part):
                file.seek(at)
                file.write(part)
