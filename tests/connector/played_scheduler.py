"""A scheduler played by the test, with the connector's half that lives in one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from connector.handle import StoreHandle
from connector.kept_speed import KeptSpeed
from connector.messages import SaveJob, StepMetadata
from connector.options import EngineOptions
from connector.scheduler_side import SchedulerSide
from prefixstore import Layout, Namespace, Store, admin
from prefixstore.testing_data import content_of, identity_for

CHUNK, BLOCK = 8, 4
LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=CHUNK, head_bytes=16)
IDENTITY = identity_for("model", LAYOUT)
DEADLINE_S = 10.0
STALL_MS = 200


class Played:
    """A scheduler and its connector. ``ask`` asks until there is an answer, as vLLM does."""

    def __init__(self, options: EngineOptions, kept: KeptSpeed | None = None) -> None:
        self.handle = StoreHandle(options)
        self.side = SchedulerSide(
            options, self.handle, lambda _: IDENTITY, LAYOUT, BLOCK, kept=kept
        )
        self.asked = 0

    @property
    def store(self) -> Store:
        store = self.handle.get()
        assert isinstance(store, Store)
        return store

    @property
    def namespace(self) -> Namespace:
        return self.store.namespace(IDENTITY, LAYOUT)

    def new(self, tokens: Sequence[int], **fields: Any) -> Any:
        request = SimpleNamespace(
            request_id=f"r{self.asked}", prompt_token_ids=list(tokens), prompt_embeds=None,
            all_token_ids=list(tokens), num_tokens=len(tokens), lora_request=None,
            cache_salt=None, kv_transfer_params=None, mm_features=None,
        )  # fmt: skip
        vars(request).update(fields)
        self.asked += 1
        self.side.on_new_request(request)
        return request

    def ask(self, request: Any, local: int = 0) -> int:
        end = time.monotonic() + DEADLINE_S
        while True:
            tokens, is_async = self.side.matched(request, local)
            self.side._lookups.new_step()  # as the step does that follows each question
            if tokens is not None:
                assert is_async == (tokens > 0)
                return tokens
            assert time.monotonic() < end, "asked in vain"

    def step(
        self,
        scheduled: dict[str, int],
        new: Sequence[tuple[str, list[int], int]] = (),
        cached: Sequence[tuple[str, list[int] | None, int]] = (),
        resumed: Sequence[str] = (),
    ) -> StepMetadata:
        """One step: entries are (request, block ids, computed tokens)."""
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=r, block_ids=[b], num_computed_tokens=n) for r, b, n in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r for r, _, _ in cached],
                new_block_ids=[None if b is None else [b] for _, b, _ in cached],
                num_computed_tokens=[n for _, _, n in cached],
                resumed_req_ids=set(resumed),
            ),
        )
        return self.side.step(output)

    def put(self, tokens: Sequence[int], salt: bytes = b"") -> None:
        refs = self.namespace.chain(tokens, salt=salt).refs()
        data = [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs]
        self.namespace.put(refs, data)
        self.store.flush()
        self.wait_for_leases(0)  # those of the copy to disk

    def wait_for_leases(self, count: int) -> None:
        end = time.monotonic() + DEADLINE_S
        while (leases := admin.stats(self.store)["leases"]) != count:
            assert time.monotonic() < end, f"{leases} leases, {count} expected"
            time.sleep(0.01)


def prompt(seed: int, count: int) -> list[int]:
    return [seed * 1000 + i for i in range(count)]


def saved(meta: StepMetadata) -> list[tuple[str, list[int], list[list[int]]]]:
    def one(job: SaveJob) -> tuple[str, list[int], list[list[int]]]:
        return job.req_id, [ref.depth for ref in job.refs], job.blocks

    return [one(job) for job in meta.saves]
