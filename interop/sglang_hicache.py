"""A storage backend for SGLang's HiCache: its pages of KV, kept in a store (a folder or a server).

    --enable-hierarchical-cache --hicache-mem-layout page_first --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "prefixstore", "interface_v1": 1,
      "module_path": "interop.sglang_hicache", "class_name": "PrefixStoreHiCache",
      "prefixstore": {"url": "http://10.0.0.7:7575", "token_file": "/etc/prefixstore/token"}}'

A chunk is one page of one rank, in the bytes of SGLang's host pool: K of all its layers, then V
(MLA: the latent, which all ranks share). Its key is a hash of SGLang's page hash, in a namespace of
(model, rank, layers, order of bytes, dtypes), so that engines with other parallel sizes, page sizes
or layouts find nothing rather than something wrong. What must hold: no call raises once SGLang has
begun (its threads are never restarted), and a server that is away is misses. What SGLang's hashes
do not tell apart is refused: LoRA, random weights, hybrid models. They leave out `cache_salt` too.
After weights were changed in a running engine the store does not know: start it anew.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from interop.sglang_pages import Options, Page, identity_of
from prefixstore.errors import ConfigError, RemoteError, StoreError, StoreTimeoutError
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef, MultimodalItem
from prefixstore.layout import Roi
from prefixstore.putting import PutState

logger = logging.getLogger("sglang.prefixstore")
_HELD = {PutState.STORED, PutState.EXISTS, PutState.BUSY, PutState.PARTIAL}


class PrefixStoreHiCache(HiCacheStorage):  # type: ignore[misc]
    """See the module docstring. Raises ConfigError from the first two methods only."""

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self._config = storage_config
        if getattr(storage_config, "attn_cp_size", 1) > 1:
            raise ConfigError("attention context parallelism", "serve without this backend")
        self._options = Options.parse(storage_config.extra_config)
        self._salt = self._options.salt.encode()
        self._group = secrets.randbits(63)
        self._store = self._options.open()
        self._namespace: NamespaceLike | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """SGLang's pool of pages in host memory. Raises ConfigError, RemoteError if refused."""
        super().register_mem_pool_host(mem_pool_host)
        self._page = Page.of(mem_pool_host, self._config)
        self._identity = identity_of(mem_pool_host, self._config)
        try:
            self._known()
        except (RemoteError, StoreTimeoutError) as error:
            if type(error) not in (
                RemoteError,
                StoreTimeoutError,
            ):  # the server answered: no token, no room for a model
                raise
            logger.warning("prefixstore: serving without the store so far: %s", error)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuse: states of other kinds (Mamba, sliding windows, indexers) are not kept."""
        raise ConfigError(f"a model with a pool {host_pool_name}", "serve without this backend")

    def _known(self) -> NamespaceLike:
        if self._namespace is None:
            self._namespace = self._store.namespace(self._identity, self._page.layout)
        return self._namespace

    def _refs(self, namespace: NamespaceLike, keys: Sequence[str]) -> list[ChunkRef]:
        """Each page is a text of its own: a hash of all tokens up to its end, as SGLang made it."""
        size = self._page.layout.chunk_tokens
        pages = ((MultimodalItem(0, size, key.encode()),) for key in keys)
        return [namespace.chain([0] * size, self._salt, page).refs()[0] for page in pages]

    # ------------------------------------------------------------------ asking
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many leading pages are stored."""
        try:
            namespace = self._known()
            return namespace.match(self._refs(namespace, keys)).num_chunks
        except StoreError as error:
            logger.debug("prefixstore: %s", error)
            return 0

    def exists(self, key: str) -> bool:
        """Whether a page is stored."""
        return self.batch_exists([key]) == 1

    # ------------------------------------------------------------------ without a copy
    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Read pages into the host pool; which of them came. Of others the pool has garbage."""
        if not self._page.contiguous:
            return self._get_flat(keys, host_indices)
        good = [True] * len(keys)
        for plane, views in enumerate(self._planes(len(keys), host_indices)):
            found = self._get(keys, views, Roi(plane, plane + 1, 0, 1))
            good = [one and other for one, other in zip(good, found, strict=True)]
        return good

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Store pages of the host pool; which of them are kept."""
        if not self._page.contiguous:
            pages = [self.mem_pool_host.get_data_page(at) for at in self._starts(host_indices)]
            return self._put(keys, [_bytes_of(page) for page in pages], None)
        good = [True] * len(keys)
        for plane, views in enumerate(self._planes(len(keys), host_indices)):
            done = self._put(keys, views, Roi(plane, plane + 1, 0, 1))
            good = [one and other for one, other in zip(good, done, strict=True)]
        return good

    def _starts(self, host_indices: torch.Tensor) -> list[int]:
        return [int(at) for at in host_indices.tolist()[:: self._page.layout.chunk_tokens]]

    def _planes(self, count: int, host_indices: torch.Tensor) -> list[list[memoryview]]:
        """The memory of the pages in the host pool: for K, then for V, a view of each page."""
        pointers, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        planes = self._page.layout.num_layers
        assert len(pointers) == planes * count
        views = [
            memoryview((ctypes.c_char * size).from_address(int(pointer))).cast("B")
            for pointer, size in zip(pointers, sizes, strict=True)
        ]
        return [views[plane::planes] for plane in range(planes)]

    def _get_flat(self, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        pages = [self.mem_pool_host.get_dummy_flat_data_page() for _ in keys]
        good = self._get(keys, [_bytes_of(page) for page in pages], None)
        for ok, page, at in zip(good, pages, self._starts(host_indices), strict=True):
            if ok:
                self.mem_pool_host.set_from_flat_data_page(at, page)
        return good

    def _get(self, keys: Sequence[str], outs: list[memoryview], roi: Roi | None) -> list[bool]:
        try:
            namespace = self._known()
            tiers = namespace.get(self._refs(namespace, keys), outs, roi)
        except StoreError as error:
            logger.debug("prefixstore: %s", error)
            return [False] * len(keys)
        return [tier > 0 for tier in tiers]

    def _put(self, keys: Sequence[str], pages: list[memoryview], roi: Roi | None) -> list[bool]:
        try:
            namespace = self._known()
            refs = self._refs(namespace, keys)
            states = namespace.put(refs, pages, roi=roi, group=self._group)
        except StoreError as error:
            logger.debug("prefixstore: %s", error)
            return [False] * len(keys)
        return [state in _HELD for state in states]

    # ------------------------------------------------------------------ whole pages, copied
    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """Read a page; ``target_location``: a flat page to fill."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Read pages; None for those that did not come."""
        pages = [
            self.mem_pool_host.get_dummy_flat_data_page() if page is None else page
            for page in target_locations or [None] * len(keys)
        ]
        good = self._get(keys, [_bytes_of(page) for page in pages], None)
        return [page if ok else None for ok, page in zip(good, pages, strict=True)]

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store a flat page."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store flat pages; whether all of them are kept."""
        return all(self._put(keys, [_bytes_of(page.contiguous()) for page in values], None))

    def clear(self) -> bool:
        """Refuse: other engines use the same pages. `prefixstore rm DIR --namespace` deletes."""
        logger.warning("prefixstore: pages are shared and were not deleted; see `prefixstore rm`")
        return False

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()


def _bytes_of(page: torch.Tensor) -> memoryview:
    return page.view(torch.uint8).numpy().data
