"""A worker's namespaces: entered by the scheduler, looked up here by name, and kept."""

from __future__ import annotations

from prefixstore.errors import StoreError
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.layout import Layout

NAMESPACES_MAX = 1024


class KnownNamespaces:
    """Those whose chunks have that layout, in the store that was asked last."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[bytes, NamespaceLike] = {}
        self._store: StoreLike | None = None

    def get(self, store: StoreLike, name: bytes) -> NamespaceLike:
        """The store's namespace of that name. Raises StoreError when its chunks are not ours."""
        if self._store is not store:
            self._known, self._store = {}, store
        namespaces = self._known  # threads that load and save share it
        known = namespaces.get(name)
        if known is None:
            known = store.namespace_of(name)
            if known.layout != self._layout:
                raise StoreError(f"namespace {name.hex()} has another layout than this engine")
            if len(namespaces) >= NAMESPACES_MAX:
                namespaces.clear()
            namespaces[name] = known
        return known
