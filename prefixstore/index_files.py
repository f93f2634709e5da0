"""The files of an index: made whole, and opened with the settings of ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lmdb

from prefixstore import config
from prefixstore.folders import sync_folder


def open_env(folder: Path, tables: int, durable: bool) -> Any:
    """An environment of so many tables. Raises lmdb.Error."""
    return lmdb.open(
        str(folder), map_size=config.INDEX_MAP_BYTES, max_dbs=tables, sync=durable,
        metasync=durable, max_readers=config.INDEX_READERS_MAX, readahead=False, mode=0o600,
    )  # fmt: skip


def make_whole(folder: Path) -> None:
    """Have an index that a power loss cannot leave half made: LMDB refuses one page of its two.

    It is made under another name, synced and renamed. The names are synced each time.
    """
    path, partial = folder / "data.mdb", folder / "data.mdb.new"
    if not path.exists():
        aside = folder / "new"
        shutil.rmtree(aside, ignore_errors=True)  # a process was killed here
        lmdb.open(str(aside), map_size=config.INDEX_MAP_BYTES).close()
        empty = (aside / "data.mdb").read_bytes()
        shutil.rmtree(aside)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(empty)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    for where in (folder, folder.parent):
        sync_folder(where)
