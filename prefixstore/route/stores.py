"""What stores have of a prompt: ``/v1/match``, and ``/v1/segments`` where engines blend.

A store is asked in the name of the identity that a worker says it has, which the store lists as one
of its namespaces. What must hold: a store that is slow, gone or refuses is a miss, after STORE_S.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from prefixstore import wire
from prefixstore.client import answers
from prefixstore.client.caller import whole
from prefixstore.client.loop import AsyncStore
from prefixstore.errors import RemoteError, StoreError
from prefixstore.identity import ModelIdentity
from prefixstore.route import limits
from prefixstore.route.choose import NOTHING, Stored
from prefixstore.route.prompt import Prompt
from prefixstore.route.workers import Worker
from prefixstore.segments import MIN_SEGMENT_TOKENS
from prefixstore.timing import timeout


class Stores:
    """The stores of the workers, by URL. ``segments``: whether texts anywhere count as well."""

    def __init__(self, token: str, ca_file: str | None, segments: bool) -> None:
        self._token, self._ca_file, self._segments = token, ca_file, segments
        self._stores: dict[str, AsyncStore] = {}
        self._names: dict[str, tuple[float, dict[str, tuple[str, int]]]] = {}
        self._questions = 0

    def close(self) -> None:
        """Let go of connections."""
        for store in self._stores.values():
            store.close()

    async def find(self, workers: Sequence[Worker], prompt: Prompt) -> dict[Worker, Stored]:
        """What the store of each worker has; workers of one store and identity share a question."""
        if not len(prompt) or prompt.salt or prompt.lora:  # keys that only engines can compute
            return {}
        asked = {
            (one.spec.store, one.identity) for one in workers if one.spec.store and one.identity
        }
        wanted = sorted(asked)[: max(0, limits.STORE_QUESTIONS_MAX - self._questions)]
        self._questions += len(wanted)
        try:
            found = await asyncio.gather(*(self._ask(*one, prompt) for one in wanted))
        finally:
            self._questions -= len(wanted)
        told = dict(zip(wanted, found, strict=True))
        return {one: told.get((one.spec.store or "", one.identity), NOTHING) for one in workers}

    async def _ask(self, url: str, identity: str, prompt: Prompt) -> Stored:
        try:
            async with timeout(limits.STORE_S):
                store = self._stores.get(url)
                if store is None:
                    store = AsyncStore(
                        url, token=self._token, deadline_s=limits.STORE_S, ca_file=self._ca_file
                    )
                    self._stores[url] = store
                name, chunk_tokens = (await self._named(url, store)).get(identity, ("", 0))
                return await self._look(store, name, chunk_tokens, prompt) if name else NOTHING
        except (StoreError, OSError, asyncio.TimeoutError):
            return NOTHING

    async def _named(self, url: str, store: AsyncStore) -> dict[str, tuple[str, int]]:
        """Namespace and tokens of a chunk, by identity."""
        read_s, names = self._names.get(url, (0.0, {}))
        if not names or time.monotonic() - read_s > limits.STORE_NAMES_S:
            deadline_s = limits.STORE_S
            told = await store.calls.json("GET", "/v1/namespaces", {}, deadline_s=deadline_s)
            names = _names_in(told)
            self._names[url] = time.monotonic(), names
        return names

    async def _look(
        self, store: AsyncStore, name: str, chunk_tokens: int, prompt: Prompt
    ) -> Stored:
        most = min(len(prompt) // chunk_tokens, wire.REFS_MAX)
        tokens = prompt.tokens[: 4 * most * chunk_tokens]
        fields: dict[str, Any] = {"namespace": name, "tokens": True}
        deadline_s = limits.STORE_S
        told = await store.calls.json("POST", "/v1/match", fields, tokens, deadline_s=deadline_s)
        prefix = chunk_tokens * len(answers.tiers_of(told, most))
        if not self._segments or len(prompt) - prefix < MIN_SEGMENT_TOKENS:
            return Stored(prefix)
        fields |= {"salt": "", "start": prefix, "min_tokens": MIN_SEGMENT_TOKENS, "items": []}
        body = wire.pack_request(fields, prompt.tokens)
        data = await store.calls.call("POST", "/v1/segments", [body], deadline_s, whole)
        found = answers.segments_of(data, chunk_tokens)
        return Stored(prefix, sum(one.num_tokens for one in found))


def _names_in(told: dict[str, Any]) -> dict[str, tuple[str, int]]:
    try:
        return {
            ModelIdentity.from_json(json.dumps(one["identity"])).namespace_hex: (
                str(one["namespace"]), int(one["layout"]["chunk_tokens"]),
            )
            for one in told["namespaces"]
            if int(one["layout"]["chunk_tokens"]) > 0
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RemoteError(f"the answer names no namespaces: {error}") from error
