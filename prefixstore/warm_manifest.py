"""The manifest of a warmed store: which text is in which chunks.

``warm-<namespace>.jsonl`` in the store's folder, or for a server a file of the user's choice; one
JSON object a line, appended once the chunks are on disk. It is for people and for `prefixstore
match`, which wants names; what is there is for the store to say, so a manifest that is lost, old or
half written costs names only. A crash can tear the last line: it is not read, and the next line
begins on one of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prefixstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Entry:
    """One piece of a document. Tokens are counted without the preamble."""

    name: str
    tag: str
    digest: str  # of the token ids of the piece
    start: int  # of the piece in its document, in tokens
    tokens: int  # that are stored
    preamble: str  # digest of its token ids
    preamble_tokens: int
    keys: list[str]  # of the chunks that hold tokens of the piece, in hex
    time_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What names the piece of text, in one namespace of perhaps several in the file. Not its
        name: of two for one text the newest entry's is kept, and neither is written for ever."""
        return self.preamble, self.digest, self.start, "".join(self.keys[:1])


_KINDS = {"str": str, "int": int, "list[str]": list}


class Manifest:
    """A file of them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, folder: Path, namespace: bytes) -> Manifest:
        """That of a namespace, by its name, of the store in a folder."""
        return cls(folder / f"warm-{namespace.hex()}.jsonl")

    def check(self) -> None:
        """Raise ConfigError if it could be neither read nor written, before anything takes long."""
        self.read()
        if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
            raise ConfigError(f"cannot write {self.path}", "give a file in a folder that is there")

    def read(self) -> list[Entry]:
        """All whole entries, the newest of each piece of a text; none when there is no file."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        found: dict[tuple[str, str, int, str], Entry] = {}
        for line in data.split(b"\n"):
            entry = _entry(line)
            if entry is not None:
                found[entry.key] = entry
        return list(found.values())

    def append(self, entries: Iterable[Entry]) -> None:
        """Add entries; they are on disk when this returns. Raises ConfigError."""
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
        if not lines:
            return
        try:
            with open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        lines = "\n" + lines
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path}: {error.strerror}", "is the disk full?"
            ) from error


def _entry(line: bytes) -> Entry | None:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    names = {f.name: _KINDS[str(f.type)] for f in fields(Entry)}
    if not isinstance(values, dict) or values.keys() != names.keys():
        return None
    if not all(type(values[name]) is kind for name, kind in names.items()):
        return None
    if not all(type(key) is str for key in values["keys"]):
        return None
    return Entry(**values)
