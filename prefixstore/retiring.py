"""Retiring models: their chunks go, and what stays behind is swept up.

Order: the name goes out of use (durable, `registry`), then its chunks are dropped. From the first
step on nobody who asks anew can find them. A process that has the namespace open is refused from
then on, as soon as its keeper looks (`Store.check_open`); what it stored meanwhile, and
what a crash left in between, is dropped by the keeper of any process: chunks of names that are not
in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixstore.failpoints import reached
from prefixstore.registry import NamespaceRecord
from prefixstore.rows import NAMESPACE

if TYPE_CHECKING:
    from prefixstore.namespace import Namespace
    from prefixstore.store import Store

_BATCH = 1024  # chunks dropped in one transaction


def retire(namespace: Namespace) -> int:
    """Drop a model: its chunks in every tier, and its name. Who enters the same identity again gets
    another name and an empty namespace; who has this one open is refused (StoreClosedError).

    Returns how many chunks were dropped. Raises FormatError if it was retired before,
    StoreTimeoutError if the disk is stalled: then the rest goes later.
    """
    return _retire(namespace)[1]


def bump(namespace: Namespace) -> tuple[Namespace, int]:
    """The model's weights are others now: `retire` it and enter it again, under another name."""
    record, dropped = _retire(namespace)
    return namespace.store.namespace(record.given, record.layout), dropped


def _retire(namespace: Namespace) -> tuple[NamespaceRecord, int]:
    store = namespace.store
    store.check_open()
    record = NamespaceRecord.retire(store.index, namespace.name)
    reached("retire.named")
    store.names.refresh()
    store.quotas.forget(namespace.name)
    return record, store.on_keeper(lambda: sweep(store))


def sweep(store: Store) -> int:
    """Drop chunks of names that are not in use (keeper thread); how many there were."""
    with store.live.read() as txn:
        usage = list(txn.scan("usage", b"n"))
    used = {name[2:] for name, value in usage if any(value)}
    with store.index.read() as txn:  # after the look at what is used: names are entered before
        strays = {name for name in used if txn.get("namespace", name) is None}
    if not strays:
        return 0
    with store.live.read() as live, store.index.read() as index:
        keys = {
            key
            for txn in (live, index)
            for key, data in txn.scan("chunk")
            if data[NAMESPACE] in strays
        }
    listed = sorted(keys)
    for at in range(0, len(listed), _BATCH):
        store.remove_now(listed[at : at + _BATCH])
        reached("retire.dropping")
    store.keeper.count("chunks_retired", len(listed))
    return len(listed)
