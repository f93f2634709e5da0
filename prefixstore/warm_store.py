"""Where warming stores and `match` looks: a folder of this host, or a server.

    with open_target(Address.parse("https://host:7575", token_file="token")) as target: ...

What must hold: nothing here changes a store, but that a folder is made if that is asked for; what
`kept` counts is where it shall stay. Of a folder that is seen chunk by chunk, in the index of its
disk. A server tells what a prompt's leading chunks are, and that all is on disk (`written`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from prefixstore import admin
from prefixstore.client.caller import RefusedError
from prefixstore.client.remote import RemoteStore
from prefixstore.client.token import TOKEN_VARIABLE, read_token
from prefixstore.connect_probe import Found, ask, check_server
from prefixstore.errors import ConfigError, LayoutError, RemoteError, StoreTimeoutError
from prefixstore.identity import ModelIdentity
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout
from prefixstore.rows import Row
from prefixstore.store import Store
from prefixstore.warm_address import Address

T = TypeVar("T")
Far = TypeVar("Far", bound="FarTarget")
FOLDER_BATCH_SHARE = 4  # of the memory tier a batch takes one part in so many
SERVER_BATCH_BYTES = 1 << 30  # its tiers are its own affair, and not told to tenants
SERVER_DEADLINE_S = 10.0  # of a call
SERVER_PATIENCE_S = 30.0  # one that is started again is back by then
_AGAIN_AFTER_S = 0.5
_PASSING = ("busy", "draining")


@dataclass(frozen=True, slots=True)
class Listed:
    """A model that a store knows."""

    name: bytes  # of its namespace
    identity: ModelIdentity  # as its owner gives it
    layout: Layout


class Target(Protocol):
    """An open store. A context manager."""

    address: Address
    sizes: tuple[int, int] | None  # caps of memory and disk in bytes; None: they are not told
    batch_bytes: int  # of KV that may be on its way to it, and that may measure, at a time
    poll_s: float
    knows_disk: bool  # whether `kept` tells what is on disk; else all is there once it is `written`

    @property
    def store(self) -> StoreLike:
        """The store."""

    def listed(self) -> list[Listed]:
        """What it knows. Raises StoreError."""

    def weight(self, one: Listed, tokens: Sequence[int]) -> int:
        """What speaks for one of several namespaces of a model; ``tokens`` are a prompt's."""

    def kept(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> tuple[int, list[bool]]:
        """How many leading chunks a match finds, and which are where they shall stay."""

    def written(self, deadline_s: float) -> bool:
        """Wait until what was put is on disk; False when the deadline came first."""

    def rows(self, refs: Sequence[ChunkRef]) -> list[Row]:
        """What is noted of chunks; none if it cannot be told."""

    def call(self, work: Callable[[], T]) -> T:
        """Ask it something that may be asked twice, again if it was away for a moment."""

    def close(self) -> None:
        """Let go."""

    def __enter__(self) -> Target:
        """Itself."""

    def __exit__(self, *_: object) -> None:
        """Close."""


def open_target(
    address: Address,
    *,
    memory: int | str | None = None,
    disk: int | str | None = None,
    memory_dir: str | None = None,
    create: bool = True,
    writing: bool = False,
) -> Target:
    """Open a store. ``create``: a folder that is not there. ``writing``: a server that takes
    nothing new will not do. Raises StoreError: one line that says what to do."""
    if address.folder is not None:
        return FolderTarget(address, Store.open(
            address.folder, memory_bytes=memory, disk_bytes=disk, memory_dir=memory_dir,
            create=create,
        ))  # fmt: skip
    if (memory, disk, memory_dir) != (None, None, None):
        raise ConfigError("memory, disk or memory_dir for a server", "it has its own")
    if address.is_pool:
        from prefixstore.warm_pool import PoolTarget

        return PoolTarget(address)
    return ServerTarget(address, writing)


def known(target: Target, identity: ModelIdentity) -> NamespaceLike | None:
    """The namespace of a model; None if nothing of it was ever stored."""
    for one in target.listed():
        if one.identity == identity:
            return target.store.namespace(one.identity, one.layout)
    return None


class FolderTarget:
    """See `Target`. Owns the store."""

    poll_s, knows_disk = 0.02, True

    def __init__(self, address: Address, store: Store) -> None:
        self.address, self.store = address, store
        self.sizes: tuple[int, int] | None = (
            store.settings.memory_bytes,
            store.settings.disk_bytes,
        )
        self.batch_bytes = store.settings.memory_bytes // FOLDER_BATCH_SHARE

    def listed(self) -> list[Listed]:
        """See `Target`."""
        return [
            Listed(record.identity.namespace, record.given, record.layout)
            for record in self.store.namespaces()
        ]

    def weight(self, one: Listed, tokens: Sequence[int]) -> int:
        """Its chunks."""
        return self._counts[one.name]

    @cached_property
    def _counts(self) -> Counter[bytes]:
        return Counter(listed.row.namespace for listed in admin.list_chunks(self.store))

    def kept(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> tuple[int, list[bool]]:
        """See `Target`: on disk, if there is one."""
        store = self.store
        with (store.index if store.has_disk else store.live).lookup("chunk") as row_of:
            there = [row_of(ref.key) is not None for ref in refs]
        return namespace.match(refs).num_chunks, there

    def written(self, deadline_s: float) -> bool:
        """See `Target`."""
        return self.store.flush(deadline_s)

    def rows(self, refs: Sequence[ChunkRef]) -> list[Row]:
        """See `Target`."""
        with self.store.live.lookup("chunk") as live, self.store.index.lookup("chunk") as disk:
            found = [live(ref.key) or disk(ref.key) for ref in refs]
        rows = []
        for data in found:
            try:
                rows.append(Row.unpack(data or b""))
            except ValueError:
                continue  # gone meanwhile
        return rows

    def call(self, work: Callable[[], T]) -> T:
        """See `Target`: it is never away."""
        return work()

    def close(self) -> None:
        """See `Target`."""
        self.store.close()

    def __enter__(self) -> FolderTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FarTarget:
    """What targets that are not on this host have in common. Owns the connections."""

    poll_s, knows_disk = 0.1, False
    sizes: tuple[int, int] | None = None
    batch_bytes = SERVER_BATCH_BYTES

    def __init__(self, address: Address, store: StoreLike) -> None:
        self.address, self.store = address, store

    def listed(self) -> list[Listed]:
        """See `Target`."""
        raise NotImplementedError

    def weight(self, one: Listed, tokens: Sequence[int]) -> int:
        """What it has of the prompt: who asks may not be told more."""
        namespace = self.store.namespace(one.identity, one.layout)
        return namespace.match(namespace.chain(tokens)).num_tokens

    def kept(self, namespace: NamespaceLike, refs: Sequence[ChunkRef]) -> tuple[int, list[bool]]:
        """See `Target`: on disk once it is `written`."""
        count = namespace.match(refs).num_chunks
        return count, [at < count for at in range(len(refs))]

    def written(self, deadline_s: float) -> bool:
        """See `Target`."""
        return self.store.flush(deadline_s)

    def rows(self, refs: Sequence[ChunkRef]) -> list[Row]:
        """See `Target`."""
        return []

    def call(self, work: Callable[[], T]) -> T:
        """See `Target`: for SERVER_PATIENCE_S. Raises StoreError."""
        end = time.monotonic() + SERVER_PATIENCE_S
        while True:
            try:
                return work()
            except (RemoteError, StoreTimeoutError) as error:
                final = isinstance(error, RefusedError) and error.code not in _PASSING
                if final or time.monotonic() > end:
                    raise
            time.sleep(_AGAIN_AFTER_S)

    def close(self) -> None:
        """See `Target`."""
        self.store.close()

    def __enter__(self: Far) -> Far:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ServerTarget(FarTarget):
    """A server: see `Target`."""

    def __init__(self, address: Address, writing: bool) -> None:
        token = read_token(address.token_file) if address.token_file else address.token
        try:
            self._remote = RemoteStore(
                address.url, token=token, deadline_s=SERVER_DEADLINE_S, ca_file=address.ca_file
            )
        except OSError as error:  # of the file; ssl.SSLError is one
            raise ConfigError(
                f"cannot use {address.ca_file}: {error}", "give certificates, PEM"
            ) from error
        super().__init__(address, self._remote)
        with ExitStack() as unless_it_will_do:
            unless_it_will_do.callback(self.store.close)
            found = Found(address.url)
            check_server(self._remote, found)
            if writing and found.read_only:
                raise ConfigError(
                    f"{address.url} takes nothing new", "it was started with --read-only"
                )
            self.listed()
            unless_it_will_do.pop_all()

    def listed(self) -> list[Listed]:
        """See `Target`."""
        url = self.address.url
        try:
            answer = ask(self._remote, "/v1/namespaces")
            return [
                Listed(
                    bytes.fromhex(one["namespace"]),
                    ModelIdentity.from_json(json.dumps(one["identity"])),
                    Layout(**one["layout"]),
                )
                for one in answer["namespaces"]
            ]
        except RefusedError as error:
            if error.code != "token":
                raise
            where = self.address.token_file or (self.address.token and TOKEN_VARIABLE)
            if not where:
                raise RemoteError(f"{url} wants a token", "give --token-file") from error
            raise RemoteError(
                f"{url} does not take the token in {where}",
                "compare it with the server's --tokens file; a change there needs a restart",
            ) from error
        except (KeyError, TypeError, ValueError, LayoutError) as error:
            raise RemoteError(f"{url} names no namespaces: {error}") from error
