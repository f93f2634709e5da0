"""What a store is to its callers, wherever it is: `open` gives one for a folder or for a server.

Protocols only. `store.Store` and `namespace.Namespace` are it in this process, `client.RemoteStore`
and `client.RemoteNamespace` over the network, `fronted` has both. What must hold of all of them is
in `testing.StoreContract`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from prefixstore import config
from prefixstore.codec import NONE, POOL_CHOICES, check_choice
from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity
from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem, Tokens
from prefixstore.layout import Buffer, Layout, Roi
from prefixstore.namespace import Lease, Match
from prefixstore.putting import PutState
from prefixstore.segments import MIN_SEGMENT_TOKENS, Segment
from prefixstore.urls import POOL_SCHEMES, SERVER_SCHEMES, shown


class NamespaceLike(Protocol):
    """The part of a store that belongs to one model identity: see `namespace.Namespace`."""

    layout: Layout
    identity: ModelIdentity  # with the mark of a server's tenant, if there is one
    name: bytes  # 16: its digest, which keys begin with

    def chain(
        self, tokens: Tokens = (), salt: bytes = b"", items: Sequence[MultimodalItem] = ()
    ) -> KeyChain:
        """The keys of a prompt."""

    def match(self, refs: Sequence[ChunkRef] | KeyChain) -> Match:
        """How many leading chunks are stored, and where."""

    def match_each(self, refs: Sequence[ChunkRef]) -> list[int]:
        """Which chunks are stored, whatever is before them: the tier of each, or MISS."""

    def find_segments(
        self,
        tokens: Tokens,
        salt: bytes = b"",
        start: int = 0,
        min_tokens: int = MIN_SEGMENT_TOKENS,
        items: Sequence[MultimodalItem] = (),
    ) -> list[Segment]:
        """Runs of the prompt's tokens that stand somewhere in a stored text."""

    def lease(
        self,
        refs: Sequence[ChunkRef],
        tiers: Sequence[int],
        duration_s: float = config.LEASE_S,
        wait: bool = True,
    ) -> tuple[Lease, int]:
        """Hold chunks that `match` found; how many leading ones are held. A folder need not be
        waited for: see `Namespace.lease`."""

    def release(self, lease: Lease) -> None:
        """End a lease."""

    def put(
        self,
        refs: Sequence[ChunkRef],
        buffers: Sequence[Buffer],
        *,
        roi: Roi | None = None,
        group: int = 0,
        ttl_s: float | None = None,
        tag: str = "",
        pin: bool = False,
        alone: bool = False,
        wait: bool = True,
        deadline_s: float = config.OP_DEADLINE_S,
    ) -> list[PutState]:
        """Store chunks, or a region of each."""

    def get(
        self,
        refs: Sequence[ChunkRef],
        outs: Sequence[memoryview],
        roi: Roi | None = None,
        progress: Callable[[], None] | None = None,
    ) -> list[int]:
        """Read chunks into buffers; the tier of each, or MISS."""

    def delete(self, refs: Sequence[ChunkRef]) -> int:
        """Remove chunks from every tier; how many were there."""

    def note_staleness(
        self, refs: Sequence[ChunkRef], values: npt.NDArray[np.floating[Any]]
    ) -> int:
        """Keep how far the KV of each token moves behind other texts."""

    def staleness_of(self, refs: Sequence[ChunkRef]) -> list[npt.NDArray[np.float16] | None]:
        """What was noted of each chunk."""


@runtime_checkable
class StoreLike(Protocol):
    """A store, in this process or on a server. A context manager."""

    def namespace(self, identity: ModelIdentity, layout: Layout) -> NamespaceLike:
        """The part that belongs to one model identity."""

    def namespace_of(self, name: bytes) -> NamespaceLike:
        """The namespace of that name. Raises StoreError if it was never entered."""

    @property
    def gone(self) -> bool:
        """Whether what was opened is no longer there, so that it must be opened again."""

    @property
    def usable(self) -> bool:
        """Whether asking it makes sense now: it is there, and has answered lately."""

    def check_open(self) -> None:
        """Ask it something. Raises StoreError that says why it cannot be used."""

    def flush(self, deadline_s: float = config.OP_DEADLINE_S) -> bool:
        """Wait until what was put is on disk; False when the deadline came first."""

    def close(self) -> None:
        """Let go."""

    def __enter__(self) -> StoreLike:
        """Itself."""

    def __exit__(self, *_: object) -> None:
        """Close."""


def open_store(
    url: str,
    *,
    token: str | None = None,
    deadline_s: float = 10.0,
    ca_file: str | None = None,
    front: str = "",
    codec: str = NONE,
    **options: Any,
) -> StoreLike:
    """Open a store by URL: ``dir:/path``, ``http://host:port``, ``https://...``, ``unix:/socket``,
    or a pool (`pool`): ``redis://host:port``, ``rediss://``, ``s3://bucket``.

    ``token``, ``deadline_s`` and ``ca_file`` are for a server (`client.RemoteStore`), which need
    not be there yet, or a pool (the token is Redis' password); ``front`` is a folder whose tiers
    stand in front of it (`fronted`); ``codec`` is a pool's, one of `codec.POOL_CHOICES`.
    ``options`` are for a folder, those of `Store.open`. Raises ConfigError, and for a folder what
    `Store.open` does.
    """
    scheme, found, rest = url.partition(":")
    if check_choice(codec, POOL_CHOICES) != NONE and scheme not in POOL_SCHEMES:
        raise ConfigError(f"codec={codec} for {shown(url)}", "leave it out: only pools have one")
    if scheme == "dir" and rest:
        from prefixstore.store import Store

        if token or ca_file or front:
            raise ConfigError(
                "a token, ca_file or front for a folder", "leave it out: the file system decides"
            )
        return Store.open(rest, **options)
    if scheme in SERVER_SCHEMES and rest:
        from prefixstore.client.remote import RemoteStore

        if options and not front:
            raise ConfigError(f"{', '.join(options)} for a server", "the server has its own")
        remote = RemoteStore(url, token=token, deadline_s=deadline_s, ca_file=ca_file)
        return _behind(front, remote, options, write_back=False) if front else remote
    if scheme in POOL_SCHEMES and rest:
        from prefixstore.pool.backend import open_backend
        from prefixstore.pool.store import PooledStore

        if options and not front:
            raise ConfigError(f"{', '.join(options)} for a pool", "they are for a front")
        backend = open_backend(url, token or "", ca_file)
        pool = PooledStore(backend, deadline_s=deadline_s, codec=codec)
        return _behind(front, pool, options, write_back=True) if front else pool
    raise ConfigError(
        f"{shown(url)!r} is no address of a store{'' if found else ': it has no scheme'}",
        f"give dir:/path, http://host:port, https://host:port or unix:/path/of/socket; of a pool "
        f"{', '.join(f'{one}://' for one in POOL_SCHEMES)}",
    )


def _behind(
    front: str, remote: StoreLike, options: dict[str, Any], *, write_back: bool
) -> StoreLike:
    """A remote store with a folder in front of it."""
    from prefixstore.fronted import FrontedStore
    from prefixstore.store import Store

    with ExitStack() as unless_it_opens:
        unless_it_opens.callback(remote.close)
        store = FrontedStore(Store.open(front, **options), remote, write_back=write_back)
        unless_it_opens.pop_all()
    return store
