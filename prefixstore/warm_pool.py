"""A pool as `warm` and `match` see it: see `warm_store.Target`."""

from __future__ import annotations

from contextlib import ExitStack

from prefixstore.client.token import read_token
from prefixstore.codec import of_pool
from prefixstore.pool.backend import open_backend
from prefixstore.pool.store import PooledStore
from prefixstore.warm_address import Address
from prefixstore.warm_store import SERVER_DEADLINE_S, FarTarget, Listed

PATIENCE_S = 60.0  # for the trailers of all chunks of a model


class PoolTarget(FarTarget):
    """What it keeps it keeps as its engine was told to: nothing there is waited for."""

    def __init__(self, address: Address) -> None:
        token = read_token(address.token_file) if address.token_file else address.token
        self._pool = PooledStore(
            open_backend(address.url, token, address.ca_file),
            deadline_s=SERVER_DEADLINE_S, patience_s=PATIENCE_S, codec=of_pool(address.codec),
        )  # fmt: skip
        super().__init__(address, self._pool)
        with ExitStack() as unless_it_will_do:
            unless_it_will_do.callback(self._pool.close)
            self._pool.check_open()
            unless_it_will_do.pop_all()

    def listed(self) -> list[Listed]:
        """See `Target`. Reads the names of all objects, so it takes as long as that."""
        return [
            Listed(one.identity.namespace, one.identity, one.layout) for one in self._pool.models()
        ]
