"""prefixstore: a persistent store of prefix KV for LLM serving.

>>> from prefixstore import Store
>>> with Store.open("/var/cache/kv", memory_bytes="8GiB", disk_bytes="200GiB") as store: ...
>>> import prefixstore
>>> with prefixstore.open("http://10.0.0.7:7575", token="...") as store: ...
>>> with prefixstore.open("redis://10.0.0.7:6379", front="/var/cache/kv") as store: ...

Names are loaded when they are first used, so that the command line starts without numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixstore.errors import StoreError
    from prefixstore.identity import ModelIdentity
    from prefixstore.interface import open_store as open
    from prefixstore.keys import ChunkRef, KeyChain, MultimodalItem
    from prefixstore.layout import Layout, Roi
    from prefixstore.namespace import Match, Namespace
    from prefixstore.pool.backend import Backend
    from prefixstore.pool.store import PooledStore
    from prefixstore.putting import PutState
    from prefixstore.store import Store

__version__ = "0.1.0"
__all__ = [
    "Backend",
    "ChunkRef",
    "KeyChain",
    "Layout",
    "Match",
    "ModelIdentity",
    "MultimodalItem",
    "Namespace",
    "PooledStore",
    "PutState",
    "Roi",
    "Store",
    "StoreError",
    "open",
]

_HOMES = {
    "Backend": "pool.backend",
    "ChunkRef": "keys",
    "KeyChain": "keys",
    "Layout": "layout",
    "Match": "namespace",
    "ModelIdentity": "identity",
    "MultimodalItem": "keys",
    "Namespace": "namespace",
    "PooledStore": "pool.store",
    "PutState": "putting",
    "Roi": "layout",
    "Store": "store",
    "StoreError": "errors",
    "open": "interface:open_store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prefixstore' has no attribute {name!r}")
    home, _, real = _HOMES[name].partition(":")
    return getattr(import_module(f"prefixstore.{home}"), real or name)
