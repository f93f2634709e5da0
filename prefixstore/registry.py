"""Which model identities a store knows, and the layout of their chunks."""

from __future__ import annotations

import json
from dataclasses import dataclass

from prefixstore.errors import LayoutError
from prefixstore.identity import ModelIdentity
from prefixstore.index import Environment, Txn
from prefixstore.layout import Layout


@dataclass(frozen=True, slots=True)
class NamespaceRecord:
    """An identity that the store knows, with the layout of its chunks."""

    identity: ModelIdentity
    layout: Layout

    def pack(self) -> bytes:
        """Encode as JSON."""
        fields = {"identity": self.identity.to_json(), "layout": self.layout.to_json()}
        return json.dumps(fields).encode()

    @classmethod
    def unpack(cls, data: bytes) -> NamespaceRecord:
        """Decode."""
        fields = json.loads(data)
        return cls(ModelIdentity.from_json(fields["identity"]), Layout(**fields["layout"]))

    @classmethod
    def register(
        cls, index: Environment, identity: ModelIdentity, layout: Layout
    ) -> NamespaceRecord:
        """Enter an identity, or compare the layout with the one it was entered with."""
        with index.read() as txn:
            data = txn.get("namespace", identity.namespace)
        if data is None:
            data = index.write(lambda txn: cls._enter(txn, identity, layout))
        record = cls.unpack(data)
        if record.layout != layout:
            raise LayoutError(
                f"namespace {identity.namespace_hex} has layout {record.layout}, not {layout}",
                "a difference that changes the layout belongs into the identity",
            )
        return record

    @classmethod
    def _enter(cls, txn: Txn, identity: ModelIdentity, layout: Layout) -> bytes:
        there = txn.get("namespace", identity.namespace)
        if there is not None:
            return there  # another process was first
        data = cls(identity, layout).pack()
        txn.put("namespace", identity.namespace, data)
        return data
