"""The manifest of a warmed store: which text is in which chunks.

``warm-<namespace>.jsonl`` in the store's folder, one JSON object a line, appended once the chunks
are on disk. It is for people and for `prefixstore match`, which wants names; what is there is for
the store to say, so a manifest that is lost, old or half written costs names only. A crash can tear
the last line: it is not read, and the next line begins on one of its own.
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
    def key(self) -> tuple[str, str, int]:
        """What names the piece of text. Not its name: of two for one text the newest entry's is
        kept, and neither is written for ever."""
        return self.preamble, self.digest, self.start


_KINDS = {"str": str, "int": int, "list[str]": list}


class Manifest:
    """The file of one namespace."""

    def __init__(self, folder: Path, namespace_hex: str) -> None:
        self.path = folder / f"warm-{namespace_hex}.jsonl"

    def read(self) -> list[Entry]:
        """All whole entries, the newest of each piece of a text; none when there is no file."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        found: dict[tuple[str, str, int], Entry] = {}
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
    if not all(isinstance(values[name], kind) for name, kind in names.items()):
        return None
    return Entry(**values)
