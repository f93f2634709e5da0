"""What may be asked of a server about its store as a whole, as coroutines: see `operations`."""

from __future__ import annotations

import json
from typing import Any

from prefixstore import config
from prefixstore.client.caller import Calls
from prefixstore.client.operations import NamespaceCalls
from prefixstore.errors import LayoutError, RemoteError, StoreError
from prefixstore.identity import ModelIdentity
from prefixstore.layout import Layout


class StoreCalls:
    """See the module docstring; the methods are those of `remote.RemoteStore`."""

    def __init__(self, calls: Calls, deadline_s: float) -> None:
        self.calls, self.deadline_s = calls, deadline_s

    async def namespace(self, identity: ModelIdentity, layout: Layout) -> NamespaceCalls:
        """The part of the store that belongs to one model identity. Raises StoreError."""
        return await NamespaceCalls.open(
            self.calls, self.register, identity, layout, self.deadline_s
        )

    async def register(self, identity: ModelIdentity, layout: Layout) -> ModelIdentity:
        """Enter a model on the server; its identity there, whose digest its keys begin with."""
        fields = {"identity": json.loads(identity.to_json()), "layout": layout.to_json()}
        answer = await self.calls.json("POST", "/v1/namespaces", fields, deadline_s=self.deadline_s)
        try:
            known = ModelIdentity.from_json(json.dumps(answer["identity"]))
            same = answer["namespace"] == known.namespace_hex
        except (KeyError, TypeError, ValueError) as error:
            raise RemoteError(f"the answer names no namespace: {error}") from error
        if not same:
            raise RemoteError(f"a namespace {answer['namespace']!r} that is not its identity's")
        return known

    async def namespace_of(self, name: bytes) -> NamespaceCalls:
        """The namespace of that name. Raises StoreError if the server does not know it."""
        answer = await self.check_open()
        try:
            [told] = [one for one in answer["namespaces"] if one["namespace"] == name.hex()]
            identity = ModelIdentity.from_json(json.dumps(told["identity"]))
            layout = Layout(**told["layout"])
        except (KeyError, TypeError, ValueError, LayoutError) as error:
            raise RemoteError(
                f"{self.calls.url} names no namespace {name.hex()}: {error}"
            ) from error
        found = await self.namespace(identity, layout)
        if found.name != name:
            raise RemoteError(f"the model of namespace {name.hex()} was retired meanwhile")
        return found

    async def check_open(self) -> dict[str, Any]:
        """Ask the server whether it is ready, and takes the token. Raises StoreError."""
        return await self.calls.json("GET", "/v1/namespaces", {}, deadline_s=self.deadline_s)

    async def flush(self, deadline_s: float = config.OP_DEADLINE_S) -> bool:
        """Wait until what was put is on disk; False when the deadline came first."""
        fields = {"deadline_s": min(deadline_s, 30.0)}
        try:
            answer = await self.calls.json("POST", "/v1/flush", fields, deadline_s=deadline_s + 1)
        except StoreError:
            return False
        return answer.get("flushed") is True
