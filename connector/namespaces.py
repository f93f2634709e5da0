"""What the store calls this engine's models: the namespaces that keys begin with.

A folder's name for a model is known beforehand unless it was retired there; a server's must be
asked for. Names change while the engine runs, when a model is retired or gets new weights, so they
are asked for again every RENEW_S, beside everything else. Until then what has the old name is
neither found nor stored. Nothing is kept over a restart.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from connector import compat
from connector.handle import StoreHandle
from connector.options import EngineOptions
from prefixstore.errors import StoreError
from prefixstore.identity import ModelIdentity
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.layout import Layout

logger = logging.getLogger("vllm.prefixstore")

RENEW_S = 5.0
NAMESPACES_MAX = 1024


@dataclass
class _Known:
    """One model in one opening of the store; ``namespace`` None: it could not be entered."""

    store: StoreLike
    asked_at: float = field(default_factory=time.monotonic)
    began_at: float | None = None  # by the thread
    namespace: NamespaceLike | None = None


class Namespaces:
    """See the module docstring. ``pool`` is the thread that asks; `name_of` is the scheduler's.
    ``beside``: what is kept here goes with another namespace, of which the log speaks."""

    def __init__(
        self,
        handle: StoreHandle,
        layout: Layout,
        pool: ThreadPoolExecutor,
        stall_s: float,
        *,
        beside: bool = False,
    ) -> None:
        self._beside = beside
        self._handle, self._layout, self._pool = handle, layout, pool
        self._stall_s = stall_s
        self._known: dict[bytes, _Known] = {}  # by the digest of the identity
        self._complained = ""

    def name_of(self, identity: ModelIdentity) -> bytes | None:
        """What the keys of this model begin with; None as long as a server has not said it.

        Has the identity entered in the store, without which workers cannot save. The first time
        that is waited for, no longer than a stalled store may cost a request.
        """
        digest, store = identity.namespace, self._handle.get()
        known, now = self._known.get(digest), time.monotonic()
        if store is not None and (known is None or known.store is not store):
            if len(self._known) >= NAMESPACES_MAX:
                self._known.clear()
            known = self._known[digest] = _Known(store)
            self._wait(known, self._pool.submit(self._enter, known, identity))
        elif store is not None and known is not None and now - known.asked_at > RENEW_S:
            known.asked_at = now
            self._pool.submit(self._enter, known, identity)
        if known is not None and known.namespace is not None:
            return known.namespace.name
        return None if self._handle.is_remote else digest

    def _wait(self, known: _Known, entering: Future[None]) -> None:
        try:
            entering.result(self._stall_s)
        except FutureTimeout:  # unless it has only waited behind look-ups
            if known.began_at is not None and time.monotonic() - known.began_at > self._stall_s:
                self._handle.stalled("entering a model")

    def _enter(self, known: _Known, identity: ModelIdentity) -> None:
        """On the thread."""
        known.began_at = time.monotonic()
        try:
            if known.namespace is None and not self._beside:
                compat.explain_new_namespace(known.store, identity)
            found = known.store.namespace(identity, self._layout)
        except StoreError as error:
            if str(error) != self._complained:
                logger.warning("prefixstore: the model was not entered: %s", error)
                self._complained = str(error)
            return
        if known.namespace is None or known.namespace.name != found.name:
            known.namespace = found

    def get(self, store: StoreLike, identity: ModelIdentity, name: bytes) -> NamespaceLike:
        """On the thread: the namespace of that name. Raises StoreError if it is no longer this
        model's."""
        known = self._known.get(identity.namespace)
        if known is None or known.store is not store or known.namespace is None:
            known = self._known[identity.namespace] = _Known(store)
            known.namespace = store.namespace(identity, self._layout)
        if known.namespace.name != name:
            raise StoreError("the model was retired meanwhile", "the next request has its new name")
        return known.namespace

    def forget(self, identity: ModelIdentity) -> None:
        """Ask for the name anew before the next request."""
        self._known.pop(identity.namespace, None)


def shown_identity(vllm_config: Any) -> str:
    """The digest of the identity of an engine's KV (hex), for who looks at its metrics; "" if it
    has none. Runs where there are no KV caches yet, so the size of a chunk is what it mostly is:
    of models with several sizes of blocks the digest is the same for all such engines, but not the
    store's."""
    try:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        options = EngineOptions.parse(extra)
        block = int(vllm_config.cache_config.block_size or 1)
        chunk_tokens = -(-options.chunk_tokens // block) * block
        identity = compat.identities(vllm_config, chunk_tokens)(None)
        return identity.with_codec(options.codec).namespace_hex
    except (AttributeError, ValueError, StoreError, OSError) as error:
        logger.debug("prefixstore: no identity to show: %s", error)
        return ""
