"""Documents to be warmed: files, folders, JSON lines, standard input.

Every document has a name, by which reports, tags and the manifest know it, and a text, or the token
ids of one. Reading is lazy and changes nothing. What cannot be read is one clear error that names
the file, and the line where there is one; only inside a folder files that hold no text are passed
over, because folders of documents have pictures in them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixstore.config import TAG_BYTES_MAX
from prefixstore.errors import ConfigError

logger = logging.getLogger("prefixstore")

STDIN = "-"
JSON_LINES = (".jsonl", ".ndjson")
_SHOWN_FIELDS = 8
_SHOWN_FILES = 3


@dataclass(frozen=True, slots=True)
class Document:
    """A text that prompts will contain. ``ids``: its token ids, if it is tokenised already."""

    name: str
    text: str = ""
    ids: Sequence[int] | None = None

    @property
    def tag(self) -> str:
        """Its name as the tag of chunks: the end of it, if it is too long."""
        return self.name.encode()[-TAG_BYTES_MAX:].decode(errors="ignore")


def read_documents(
    sources: Sequence[str], field: str = "text", stdin: Callable[[], bytes] | None = None
) -> Iterator[Document]:
    """The documents of some sources, in the order given.

    A source is a text file; a file of JSON lines (`JSON_LINES`), each an object with the text in
    ``field``; a folder, all of it, sorted by path, without what begins with a dot; or "-" for
    standard input, one text. Raises ConfigError.
    """
    if sources.count(STDIN) > 1:
        raise ConfigError("standard input is given twice", "give - once")
    for source in sources:
        if source == STDIN:
            data = (stdin or sys.stdin.buffer.read)()
            yield Document("stdin", _decode(data, "standard input"))
            continue
        path = Path(source).expanduser()
        if path.is_dir():
            yield from _folder(path, field)
        else:
            yield from _file(path, field)


def _folder(folder: Path, field: str) -> Iterator[Document]:
    found, skipped = 0, []
    for where, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(where) / name
            if path.is_file() and (path.suffix in JSON_LINES or _is_text(path)):
                yield from _file(path, field)
                found += 1
            else:
                skipped.append(name)
    if skipped:
        names = ", ".join(skipped[:_SHOWN_FILES])
        more = f" and {len(skipped) - _SHOWN_FILES} more" if len(skipped) > _SHOWN_FILES else ""
        logger.warning("%s: passed over what is no text: %s%s", folder, names, more)
    if not found:
        raise ConfigError(f"{folder} holds no text files", "give a folder of documents, or files")


def _refuse(error: OSError) -> None:
    raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error


def _is_text(path: Path) -> bool:
    try:
        _decode(_read(path), str(path))
    except ConfigError:
        return False
    return True


def _file(path: Path, field: str) -> Iterator[Document]:
    data = _read(path)
    if path.suffix not in JSON_LINES:
        yield Document(str(path), _decode(data, str(path)))
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield _entry(_decode(line, f"{path} line {number}"), path, number, field)


def _entry(line: str, path: Path, number: int, field: str) -> Document:
    where = f"{path} line {number}"
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}", "write one object a line") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is a JSON {type(entry).__name__}", "write one object a line")
    if field not in entry:
        known = ", ".join(list(entry)[:_SHOWN_FIELDS]) or "none"
        raise ConfigError(f"{where} has no field {field!r}", f"its fields: {known}; see --field")
    if not isinstance(entry[field], str):
        kind = type(entry[field]).__name__
        raise ConfigError(f"{where}: field {field!r} is a {kind}", "give a text")
    names = [entry[key] for key in ("name", "id") if key in entry]
    name = next((str(n) for n in names if isinstance(n, str | int) and str(n)), "")
    for text in (name, entry[field]):
        if not _is_unicode(text):  # half of a surrogate pair, which JSON can write
            raise ConfigError(f"{where} has characters that are no Unicode", "mend them")
    return Document(name or f"{path}:{number}", entry[field])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check the path") from error


def _decode(data: bytes, what: str) -> str:
    try:
        text = data.decode()
    except UnicodeError as error:
        raise ConfigError(f"{what} is not UTF-8: {error}", "convert it, or leave it out") from error
    if "\0" in text:
        raise ConfigError(f"{what} holds NUL bytes: it is no text", "leave it out")
    return text.removeprefix("\ufeff")
