"""Texts for `prefixstore warm` and `blend-check`: files, folders, JSON lines, standard input.

Every document has a name, by which reports, tags and the manifest know it, and a text, or the token
ids of one. Reading is lazy and changes nothing. What cannot be read is one clear error that names
the file, and the line where there is one; only inside a folder files that hold no text are passed
over, because folders of documents have pictures in them.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixstore.config import TAG_BYTES_MAX, format_bytes
from prefixstore.errors import ConfigError

logger = logging.getLogger("prefixstore")

STDIN = "-"
JsonObject = dict[str, Any]
JSON_LINES = (".jsonl", ".ndjson")
_SHOWN_FIELDS = 8
_SHOWN_FILES = 3
TEXT_BYTES_MAX = 16 << 20  # of one text: its token ids take some 200 times as much, for a moment
_FILE_SHARE = 8  # of what may be read, one file gets one part in so many


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
    sources: Sequence[str],
    field: str = "text",
    stdin: Callable[[], bytes] | None = None,
    *,
    limit_bytes: int | None = None,
    order: random.Random | None = None,
) -> Iterator[Document]:
    """The documents of some sources, in the order given.

    A source is a text file; a file of JSON lines (`JSON_LINES`), each an object with the text in
    ``field``; a folder, all of it, sorted by path, without what begins with a dot; or "-" for
    standard input, one text. With ``limit_bytes``, reading stops when so many are read; one file
    gets a part of them, and is cut behind it. With ``order``, the files of a folder come in an
    order it draws, so that what is read of too many is no part of its own. Raises ConfigError.
    """
    if sources.count(STDIN) > 1:
        raise ConfigError("standard input is given twice", "give - once")
    reader = _Reader(field, limit_bytes, order)
    for source in sources:
        path = Path(source).expanduser()
        if source == STDIN:
            data = (stdin or sys.stdin.buffer.read)()
            yield Document("stdin", _decode(data, "standard input"))
        elif path.is_dir():
            yield from reader.folder(path)
        elif not reader.is_done(path):
            yield from reader.file(path)


def read_text(path: str | os.PathLike[str]) -> str:
    """A file of text, by the rules for documents. Raises ConfigError."""
    return _decode(_read(Path(path).expanduser())[0], str(path))


def read_objects(path: Path, limit_bytes: int | None = None) -> Iterator[tuple[int, JsonObject]]:
    """What a file of JSON lines holds: (number of the line, object). Raises ConfigError.

    With ``limit_bytes``, the whole lines of the first so many.
    """
    return _objects(path, *_read(path, limit_bytes))


def check_unicode(where: str, texts: Iterable[str]) -> None:
    """Raise ConfigError for half of a surrogate pair, which JSON can write."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where} has characters that are no Unicode", "mend them") from error


class _Reader:
    """Documents of files and folders, as long as there are bytes left to read."""

    def __init__(self, field: str, limit_bytes: int | None, order: random.Random | None) -> None:
        self._field, self._limit, self._order = field, limit_bytes, order
        self._left = limit_bytes

    def is_done(self, path: Path) -> bool:
        """Whether nothing more is to be read; says so."""
        if self._limit is None or self._left:
            return False
        logger.warning("%s is not read: %s are enough", path, format_bytes(self._limit))
        return True

    def folder(self, folder: Path) -> Iterator[Document]:
        """Of a folder, what is text."""
        found, skipped = 0, []
        files = list(_files(folder))
        if self._order is not None:
            self._order.shuffle(files)
        for path in files:
            if self.is_done(path):
                return
            if path.suffix in JSON_LINES:
                yield from self.file(path)
            else:
                try:
                    document = self._text(path)
                except ConfigError:
                    skipped.append(path.name)
                    continue
                yield document
            found += 1
        if skipped:
            names = ", ".join(skipped[:_SHOWN_FILES])
            more = f" and {len(skipped) - _SHOWN_FILES} more" if len(skipped) > _SHOWN_FILES else ""
            logger.warning(
                "%s: passed over what is no text, or too long: %s%s", folder, names, more
            )
        if not found:
            raise ConfigError(
                f"{folder} holds no text files", "give a folder of documents, or files"
            )

    def file(self, path: Path) -> Iterator[Document]:
        """Of a file given by name, which must be text."""
        if path.suffix not in JSON_LINES:
            yield self._text(path)
            return
        data, is_cut = _read(path, self._share())
        self._spend(len(data))
        for number, entry in _objects(path, data, is_cut):
            yield _entry(entry, path, number, self._field)

    def _text(self, path: Path) -> Document:
        data, is_cut = _read(path, self._share())
        text = _decode(data, str(path), is_cut)
        self._spend(len(data))
        return Document(str(path), text)

    def _share(self) -> int | None:
        if self._limit is None or self._left is None:
            return None
        return min(self._left, -(-self._limit // _FILE_SHARE))

    def _spend(self, count: int) -> None:
        if self._left is not None:
            self._left -= count


def _files(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where) / name for name in sorted(files) if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error


def _objects(path: Path, data: bytes, is_cut: bool) -> Iterator[tuple[int, JsonObject]]:
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if is_cut else lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            entry: Any = json.loads(_decode(line, where))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is no JSON: {error}", "write one object a line") from error
        if not isinstance(entry, dict):
            kind = type(entry).__name__
            raise ConfigError(f"{where} is a JSON {kind}", "write one object a line")
        yield number, entry


def _entry(entry: JsonObject, path: Path, number: int, field: str) -> Document:
    where = f"{path} line {number}"
    if field not in entry:
        known = ", ".join(list(entry)[:_SHOWN_FIELDS]) or "none"
        raise ConfigError(f"{where} has no field {field!r}", f"its fields: {known}; see --field")
    if not isinstance(entry[field], str):
        kind = type(entry[field]).__name__
        raise ConfigError(f"{where}: field {field!r} is a {kind}", "give a text")
    names = [entry[key] for key in ("name", "id") if key in entry]
    name = next((str(n) for n in names if isinstance(n, str | int) and str(n)), "")
    check_unicode(where, (name, entry[field]))
    return Document(name or f"{path}:{number}", entry[field])


def _read(path: Path, most: int | None = None) -> tuple[bytes, bool]:
    """Up to ``most`` bytes of a file, and whether it has more."""
    try:
        with open(path, "rb") as file:
            if most is None:
                return file.read(), False
            return file.read(most), bool(file.read(1))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check the path") from error


def _decode(data: bytes, what: str, is_cut: bool = False) -> str:
    if len(data) > TEXT_BYTES_MAX:
        raise ConfigError(
            f"{what} is a text of {format_bytes(len(data))}",
            f"split it: one may have {format_bytes(TEXT_BYTES_MAX)}",
        )
    try:
        # Of a text that is cut, the last character may be half a one: it is left out.
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=not is_cut)
    except UnicodeError as error:
        raise ConfigError(f"{what} is not UTF-8: {error}", "convert it, or leave it out") from error
    if "\0" in text:
        raise ConfigError(f"{what} holds NUL bytes: it is no text", "leave it out")
    return text.removeprefix("\ufeff")
