"""LMDB's errors, and what comes of records that cannot be read, as errors of ours."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from prefixstore.errors import (
    DamagedError,
    FormatError,
    StoreClosedError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
)
from prefixstore.index_check import Damaged
from prefixstore.opened import REOPEN

# What comes of records that do not fit together: their bytes were changed, or we are wrong.
_DAMAGE = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError,
)  # fmt: skip
_BEGIN_ANEW = (
    "end what uses the store and start again; if it is still refused, remove that folder: the "
    "store, a cache, begins anew"
)
_CONTRADICTIONS = (AssertionError, ArithmeticError, LookupError, ValueError, struct.error)


def not_opened(folder: Path, error: Exception) -> StoreError:
    """What kept an environment from being opened."""
    if "already open in this process" in str(error):  # given up, and LMDB still waits
        return StoreTimeoutError(
            f"this process waits for the writer lock of {folder}, or for its disk, to close it",
            "another process holds the lock, or the disk is stalled; wait, and try again",
        )
    if isinstance(error, (Damaged, *_DAMAGE)):
        return DamagedError(f"the index {folder} is damaged: {error}", _BEGIN_ANEW)
    return FormatError(
        f"cannot open the index {folder}: {error}",
        "the folder must be on a local, writable file system, and there must be memory for its map",
    )


def translate(error: Exception, folder: Path) -> Exception:
    """What a transaction raised, as an error of ours if it is LMDB's or damage."""
    if isinstance(error, StoreError):  # some are ValueErrors too
        return error
    if isinstance(error, lmdb.MapFullError):
        return StoreFullError(f"the index {folder} has reached its limit", "remove chunks")
    if isinstance(error, lmdb.PanicError):  # LMDB does nothing more until it is opened again
        return StoreClosedError(f"the index {folder} had an input/output error", REOPEN)
    if isinstance(error, lmdb.DiskError):
        return StoreFullError(f"the index {folder} cannot be written: {error}", "free disk space")
    if isinstance(error, (*_DAMAGE, *_CONTRADICTIONS)):
        damage = DamagedError(f"the index {folder} is damaged: {error}", _BEGIN_ANEW)
        damage.__cause__ = error
        return damage
    if isinstance(error, lmdb.Error):
        return StoreError(f"the index {folder} did not do it: {error}", "try again")
    return error


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """LMDB's errors as ours, and what comes of records that cannot be read."""
    try:
        yield
    except StoreError:
        raise
    except (lmdb.Error, *_CONTRADICTIONS) as error:
        raise translate(error, folder) from error
