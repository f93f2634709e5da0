"""The verbs ``ttl`` and ``retire``: how long chunks are kept, and models that are over."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from prefixstore.errors import ConfigError

if TYPE_CHECKING:
    from prefixstore.store import Store

_BATCH = 1024  # chunks changed in one transaction


def add_ttl_arguments(sub: Any) -> None:
    """The options of ``ttl``, beside those that select chunks."""
    sub.add_argument(
        "--set", required=True, metavar="AGE", help="from now (90m, 12h, 30d), or never"
    )


def add_retire_arguments(sub: Any) -> None:
    """The options of ``retire``."""
    sub.add_argument(
        "--namespace", required=True, metavar="HEX", help="of the model (its first digits will do)"
    )
    sub.add_argument(
        "--bump", action="store_true", help="its weights are others now: enter it again, empty"
    )


def run_ttl(args: argparse.Namespace) -> int:
    """Change when chunks expire."""
    from prefixstore import admin
    from prefixstore.cli_run import open_store, parse_age, selection
    from prefixstore.keys import ChunkRef

    ttl_s = None if args.set == "never" else parse_age(args.set)
    chosen = selection(args)
    done = 0
    with open_store(args) as store:
        by_space: dict[bytes, list[ChunkRef]] = {}
        for one in admin.list_chunks(store, chosen):
            ref = ChunkRef(one.key, b"", 0, b"")
            by_space.setdefault(one.row.namespace, []).append(ref)
        for name, refs in by_space.items():
            ns = store.namespace_of(name)
            for at in range(0, len(refs), _BATCH):
                done += ns.set_ttl(refs[at : at + _BATCH], ttl_s)
    if args.json:
        print(json.dumps({"chunks": done}))
    else:
        when = "no more" if ttl_s is None else f"in {args.set}"
        print(f"{done} chunks expire {when}")
    return 0


def run_retire(args: argparse.Namespace) -> int:
    """Drop a model: its chunks and its name."""
    from prefixstore.cli_run import open_store
    from prefixstore.retiring import bump

    with open_store(args) as store:
        name = _name_of(store, args.namespace)
        ns = store.namespace_of(name)
        new, dropped = bump(ns) if args.bump else (None, ns.retire())
    told = {"retired": name.hex(), "chunks": dropped, "namespace": new and new.name.hex()}
    if args.json:
        print(json.dumps(told))
        return 0
    print(f"namespace {name.hex()} is retired, its {dropped} chunks are gone")
    if new is not None:
        print(f"the model is namespace {new.name.hex()} from now on")
    return 0


def _name_of(store: Store, text: str) -> bytes:
    """The namespace whose name begins like that. Raises ConfigError."""
    names = [record.identity.namespace for record in store.namespaces()]
    found = [name for name in names if name.hex().startswith(text.lower())]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} namespaces begin with {text!r}", "see them with `prefixstore stats`"
        )
    return found[0]
