"""Which format a store has, and whether this code reads it.

A format version covers all that outlives a reboot: settings, records of the index, slots, keys,
identities. It is raised with every change that older code would read wrongly, together with a step
(`migrating`) and a golden store (``tests/golden``). It stands in two places: in the durable index,
where a migration changes it in the transaction that changes the records, and in ``store.json``,
which is written after that and read first. Where they differ the index is right.

A row or identity of another version inside a store of a known format is damage, not news.
"""

from __future__ import annotations

from pathlib import Path

from prefixstore import config, segment_index
from prefixstore.config import Settings, load_fields, other_format, save_settings, stored_version
from prefixstore.errors import FormatError, StoreError
from prefixstore.index import Environment, Txn

INDEX_TABLES = ("meta", "chunk", "namespace", "quota", *segment_index.TABLES)
FORMAT = b"format"  # in table ``meta``
_FIRST = 1  # of an index that has records and says nothing: version 1 did not always say it


def format_of(txn: Txn) -> int:
    """The format version of a durable index; 0 for one that is empty, which is of any."""
    found = txn.get_int("meta", FORMAT)
    if not found and (txn.count("namespace") or txn.count("chunk")):
        return _FIRST
    return found


def open_index(folder: Path, *, walk: bool) -> Environment:
    """The durable index of a store, if it is of the format that this code reads. Raises FormatError
    and StoreTimeoutError."""
    index = Environment(folder / "index", INDEX_TABLES, durable=True, walk=walk)
    try:
        _settle(index, folder)
    except StoreError:
        index.close()
        raise
    return index


def _settle(index: Environment, folder: Path) -> None:
    """Mark a new index, and refuse one of another format."""
    with index.read() as txn:
        marked, found = txn.get_int("meta", FORMAT), format_of(txn)
    if found not in (0, config.FORMAT_VERSION):
        raise other_format(folder, found)
    if not marked:
        index.write(lambda txn: txn.put_int("meta", FORMAT, config.FORMAT_VERSION))


def settle_version(folder: Path) -> None:
    """Refuse a store whose settings are of another format, unless a migration was ended between
    its commit and the settings: then write them. Under the store's lock. Raises FormatError."""
    stored = stored_version(folder)
    if stored is None or stored == config.FORMAT_VERSION:
        return
    if stored > config.FORMAT_VERSION or index_format(folder) != config.FORMAT_VERSION:
        raise other_format(folder, stored)
    declare(folder, config.FORMAT_VERSION)


def index_format(folder: Path) -> int:
    """The format version of the durable index of a store; 0 where there is none, or it is empty.
    Raises FormatError."""
    if not (folder / "index" / "data.mdb").exists():
        return 0
    index = Environment(folder / "index", INDEX_TABLES, durable=True)
    try:
        with index.read() as txn:
            return format_of(txn)
    finally:
        index.close()


def declare(folder: Path, version: int) -> None:
    """Write a format version into the settings."""
    fields = load_fields(folder)
    if fields is None:
        raise FormatError(f"{folder} holds no store", "check the path")
    try:
        settings = Settings(**{**fields, "format_version": version})
    except TypeError as error:
        raise FormatError(
            f"{folder / config.SETTINGS_FILE}: {error}", "restore the file"
        ) from error
    save_settings(folder, settings)
