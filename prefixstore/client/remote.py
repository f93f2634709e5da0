"""A store on a server: what `prefixstore.open` gives for ``http://`` and ``unix:``."""

from __future__ import annotations

from prefixstore import config
from prefixstore.client.caller import Caller
from prefixstore.client.connection import finish
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.client.stores import StoreCalls
from prefixstore.identity import ModelIdentity
from prefixstore.layout import Layout


class RemoteStore:
    """A store behind ``http://``, ``https://`` or ``unix:``. A context manager. Thread-safe.

    ``deadline_s`` bounds each call; a transfer has a second more for each 64 MiB. ``ca_file``: the
    certificates that a TLS server's must be signed by, if not the system's.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        deadline_s: float = 10.0,
        ca_file: str | None = None,
    ) -> None:
        self.caller = Caller(url, token, ca_file)
        self._calls = StoreCalls(self.caller.calls, deadline_s)

    @property
    def deadline_s(self) -> float:
        """Bound of each call."""
        return self._calls.deadline_s

    @deadline_s.setter
    def deadline_s(self, value: float) -> None:
        self._calls.deadline_s = value

    def namespace(self, identity: ModelIdentity, layout: Layout) -> RemoteNamespace:
        """The part of the store that belongs to one model identity. Raises StoreError."""
        return RemoteNamespace(finish(self._calls.namespace(identity, layout)))

    def namespace_of(self, name: bytes) -> RemoteNamespace:
        """The namespace of that name. Raises StoreError if the server does not know it."""
        return RemoteNamespace(finish(self._calls.namespace_of(name)))

    @property
    def gone(self) -> bool:
        """Never: a server that was replaced has its namespaces entered again."""
        return False

    @property
    def usable(self) -> bool:
        """Whether the server has answered lately, or it is time to ask again."""
        return not self.caller.breaker.is_open

    def check_open(self) -> None:
        """Ask the server whether it is ready, and takes the token. Raises StoreError."""
        finish(self._calls.check_open())

    def flush(self, deadline_s: float = config.OP_DEADLINE_S) -> bool:
        """Wait until what was put is on disk; False when the deadline came first."""
        return finish(self._calls.flush(deadline_s))

    def close(self) -> None:
        """Let go of the connections."""
        self.caller.close()

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
