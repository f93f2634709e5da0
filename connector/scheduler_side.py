"""The half of the connector that lives in vLLM's scheduler: look up, lease, decide, dispatch.

One request's way through it:

  1. ``on_new_request``   keys of the prompt; a look-up starts on the look-up thread
  2. ``matched``          its answer: how many tokens beyond vLLM's own the store will load
  3. ``allocated``        vLLM gave blocks: the load is queued for the next message to the workers
  4. ``step``             each step: queued loads, and the chunks this step completes, to be saved
  5. ``loaded``           the workers are done: the lease ends
  6. ``finished``         the request is forgotten

What must hold: no method waits longer than `lookup.WAIT_S` (but once for each model: `Namespaces`),
and none touches the disk. An answer later than ``stall_ms`` is a miss.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from connector import compat
from connector.blend_claims import BlendClaims
from connector.found import Found, Search
from connector.groups import KvGroup
from connector.handle import StoreHandle
from connector.kept_speed import KeptSpeed
from connector.lookup import Lookups
from connector.messages import LoadJob, StepMetadata, WorkerReport
from connector.options import EngineOptions, RequestOptions, full_salt
from connector.plan import LoadPlanner, StepTimes
from connector.states import StateForm
from connector.tally import Tally
from connector.tracked import Tracked
from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity
from prefixstore.keys import KeyChain
from prefixstore.layout import Layout

logger = logging.getLogger("vllm.prefixstore")

LOOK_AGAIN_S = 0.03  # between two looks for chunks that another engine is about to have stored
BUDGET_MIN_S = 0.02  # of a load, however long its look-up took


class SchedulerSide:
    """See the module docstring. All methods run on the engine core's thread."""

    def __init__(
        self,
        options: EngineOptions,
        handle: StoreHandle,
        identities: Callable[[Any], ModelIdentity],
        layout: Layout,
        block_tokens: int,
        steps_ahead: int = 1,
        blends: BlendClaims | None = None,
        isolate: Callable[[Any, int], None] = lambda request, exact_tokens: None,
        groups: Sequence[KvGroup] = (),
        states: StateForm | None = None,
        kept: KeptSpeed | None = None,
    ) -> None:
        self._options, self._handle, self._layout = options, handle, layout
        self._blends = blends or BlendClaims(None, layout.num_layers, 1)
        self._isolate = isolate
        self._identities = identities
        self._groups, self._states = groups or (KvGroup(block_tokens),), states
        self._epoch = b""  # changes when the engine's weights may have
        self._disabled = ""  # why the workers cannot use the store
        self._requests: dict[str, Tracked] = {}
        self._queued_loads: list[LoadJob] = []
        beside = states.layout.payload_bytes if states is not None else 0
        self._planner = LoadPlanner(layout, beside, auto=options.weighs, kept=kept)
        self._steps = StepTimes(self._planner.speeds, steps_ahead)
        self._counts = Tally()
        self._lookups = Lookups(handle, layout, options.stall_ms / 1000, self._counts, states)

    # ------------------------------------------------------------------ 1. arrival
    def on_new_request(self, request: Any) -> None:
        """Begin to track a request and look its prompt up."""
        if self._disabled or not compat.has_stable_tokens(request):
            return
        try:
            options = RequestOptions.parse(request.kv_transfer_params)
            blend, error = self._blends.options_of(options.blend), ""
        except ConfigError as mistake:
            options, error, blend = RequestOptions(read=False, write=False), str(mistake), None
            self._counts.add("bad_params")
        try:
            identity = self._identities(request.lora_request)
        except (ValueError, OSError) as mistake:
            logger.warning("prefixstore: request %s bypasses: %s", request.request_id, mistake)
            return
        names = self._lookups.names_of(identity)
        if not names:
            self._counts.add("miss_bypassed", 1)
            return
        salt = full_salt(request.cache_salt, options.salt, self._epoch)
        items, size = compat.multimodal_items(request), self._layout.chunk_tokens
        chains = [KeyChain(name, size, (), salt, items) for name in names]
        tracked = Tracked(
            request, options, identity, chains[0], self._groups, self._states,
            None if self._states is None else chains[1],
            blend=blend, may_load=options.read, error=error,
        )  # fmt: skip
        self._requests[request.request_id] = tracked
        if options.read and self._options.load != "never":
            self._look_up(tracked)

    def _look_up(self, tracked: Tracked) -> None:
        tracked.extend()
        tokens = tracked.request.num_tokens
        search = None
        if tracked.blend is not None:
            options = tracked.blend
            tokens_of = tracked.request.prompt_token_ids
            search = Search(tokens_of, options.min_segment_tokens, options.wants_staleness)
        chains = tracked.chain, tokens, search, tracked.states
        self._lookups.begin(tracked.lookup, tracked.identity, *chains)

    # ------------------------------------------------------------------ 2. the answer
    def matched(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond ``num_computed_tokens`` to load; None to be asked again."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or not tracked.may_load or self._options.load == "never":
            return 0, False
        lookup = tracked.lookup
        if self._handle.get() is None:
            self._lookups.end(lookup)
            tracked.outcome = tracked.outcome or "miss_bypassed"
            return 0, False
        if not lookup.is_for(request.num_tokens):
            self._look_up(tracked)
        found = self._lookups.answer(lookup)
        if found is None:
            if lookup.future is not None:
                return None, False
            tracked.outcome = lookup.failed
            return 0, False
        if lookup.declined:
            return 0, False
        if tracked.waits(found.match.num_chunks):
            if time.monotonic() - lookup.began_at >= LOOK_AGAIN_S:
                self._look_up(tracked)
            else:
                self._lookups.pause()
            return None, False
        return self._claim(tracked, found, num_computed_tokens)

    def _claim(
        self, tracked: Tracked, found: Found, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        size = self._layout.chunk_tokens
        start = num_computed_tokens // size
        tracked.next_save = max(tracked.next_save, found.match.num_chunks)
        tiers = found.match.tiers[start : tracked.chunks_to_load(tracked.request.num_tokens)]
        limit = tracked.options.max_load_tokens
        blends = limit is None and self._may_blend(tracked, found)
        splits = limit is None and not blends and self._blends.split_rows > 0
        tracked.claim, tracked.front = None, self._planner.front(tiers) if splits else 0.0
        stop = start + len(tiers)
        if not tracked.front:
            stop = self._planner.stop(tiers, num_computed_tokens, limit, found.states)
        tokens = max(0, stop * size - num_computed_tokens)
        if blends and stop - start == len(tiers):
            last = tracked.request.num_prompt_tokens
            exact, right = found.match.num_tokens, num_computed_tokens + tokens
            wanted = tracked.blend, found.segments
            claim = self._blends.claim(*wanted, exact, last, found.staleness)
            if claim is not None:
                first = tracked.isolate(exact, self._isolate)
                if first and num_computed_tokens > exact:
                    return None, False  # vLLM's hit was for names its blocks no longer have
            if right != exact:
                claim = self._blends.claim(*wanted, right, last, found.staleness)
            tracked.claim = claim
            tokens = tokens if claim is None else claim.end - num_computed_tokens
        if tokens == 0:
            tracked.outcome = found.miss(start, len(tiers))
            self._lookups.decline(tracked.lookup)
            return 0, False
        tracked.promised, tracked.outcome = (start, stop), ""
        return tokens, True

    def _may_blend(self, tracked: Tracked, found: Found) -> bool:
        """Whether it is wanted, and all of it is faster to load than to compute."""
        tiers = [tier for segment in found.segments for tier in segment.tiers]
        wanted = bool(tiers) and self._blends.options is not None
        return wanted and self._planner.worth(tiers) == len(tiers)

    # ------------------------------------------------------------------ 3. blocks
    def allocated(self, request: Any, blocks: Sequence[Sequence[int]], num_external: int) -> None:
        """vLLM allocated blocks, by group; ``num_external`` tokens of them are ours to fill."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        tracked.take_blocks(blocks)
        if num_external == 0:
            if not tracked.loading:
                self._counts.add(tracked.outcome, 1 if tracked.outcome else 0)
                tracked.outcome = ""
                self._lookups.end(tracked.lookup)
            return
        found = tracked.lookup.found
        assert found is not None, "vLLM allocated blocks for a load that was not promised"
        size = self._layout.chunk_tokens
        (start, stop), claim = tracked.promised, tracked.claim
        local = (stop * size if claim is None else claim.end) - num_external
        tracked.loading = tracked.lookup.taken = True
        tracked.blended = tracked.blended or claim is not None
        job = LoadJob(
            request.request_id, tracked.chain.namespace,
            tracked.chain.refs(start, stop), tracked.blocks_of(start, stop),
            (local - start * size) // self._groups[0].block_tokens,
            max(BUDGET_MIN_S, self._options.stall_ms / 1000 - tracked.lookup.waited_s),
            tracked.rows_job(local), tracked.state_load(stop, blocks),
            self._planner.chunk_compute_s,
        )  # fmt: skip
        self._queued_loads.append(job)
        if tracked.front:
            self._blends.split(request.request_id, local, tracked.front)
        if claim is not None:
            self._counts.add("blend_reused_tokens", claim.reused_tokens)
        tiers = found.match.tiers[start:stop]
        for tier, chunks in Counter(tiers).items():  # vLLM has the beginning of the first
            own = local - start * size if tier == tiers[0] else 0
            self._counts.add(f"tokens_hit_{tier}", chunks * size - own)

    # ------------------------------------------------------------------ 4. each step
    def step(self, scheduler_output: Any) -> StepMetadata:
        """The message to the workers for this step."""
        self._lookups.new_step()
        meta = StepMetadata(loads=self._queued_loads)
        self._queued_loads = []
        scheduled = scheduler_output.num_scheduled_tokens
        meta.idle = not scheduled
        meta.blends = self._blends.commands(meta.idle)
        computed: dict[str, int] = {}
        for req_id, blocks, start, replace in compat.scheduled_requests(scheduler_output):
            computed[req_id] = start
            tracked = self._requests.get(req_id)
            if tracked is not None and blocks is not None:
                tracked.take_blocks(blocks, replace)
        places = {} if self._states is None else compat.places_of_states(scheduler_output)
        may_save = self._options.save and not self._disabled and self._handle.get() is not None
        for req_id, count in scheduled.items():
            tracked = self._requests.get(req_id)
            if tracked is not None and may_save and tracked.options.write:
                start = computed[req_id]
                meta.saves += tracked.save_jobs(start + count, start, places.get(req_id, {}))
        self._steps.began(sum(scheduled.values()), rows=bool(meta.blends))
        return meta

    # ------------------------------------------------------------------ 5. and 6.
    def worker_news(
        self,
        report: WorkerReport | None,
        loaded: Sequence[str],
        invalid: set[int],
        failed: Collection[str] = (),
    ) -> None:
        """What the workers said after a step: loads that ended, measurements, trouble."""
        report = report or WorkerReport()
        self._steps.ended()
        for req_id in self._requests.keys() & report.cut:
            self._requests[req_id].cut = True
        if invalid:
            for tracked in self._requests.values():
                if tracked.loading:
                    tracked.note_failure(invalid)
        for req_id in self._requests.keys() & set(failed):
            self._requests[req_id].note_failed_load()
        self._blends.placed(report.placed)
        self._blends.loaded(report.blends)
        for req_id in loaded:
            self._blends.ended(req_id)  # last, so that nothing is known of it any more
            ended = self._requests.get(req_id)
            if ended is not None:
                ended.loading = False
                self._lookups.end(ended.lookup)
        if report.no_blending:
            self._blends.refuse(report.no_blending)
        for tier, speed in report.bandwidth.items():
            self._planner.speeds.saw_load(tier, speed)
        if report.stalled:
            self._handle.stalled("a load")
        if report.disabled and not self._disabled:
            self._disabled = report.disabled
            for tracked in self._requests.values():
                self._lookups.end(tracked.lookup)
            self._requests.clear()

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Forget a request; returns what its response should carry."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return None
        if tracked.loading:
            self._blends.cancel(request.request_id)
        self._lookups.end(tracked.lookup)
        return {"prefixstore": {"error": tracked.error}} if tracked.error else None

    def reset(self) -> None:
        """The engine's KV may be another from now on (weights changed in place): share none of it
        with before, nor with other engines."""
        self._epoch = secrets.token_bytes(16)
        for tracked in self._requests.values():
            self._lookups.end(tracked.lookup)
        self._requests.clear()

    def take_counts(self) -> dict[str, int]:
        """Counts since the last call."""
        return self._counts.take()

    def close(self) -> None:
        """Stop the look-up thread."""
        self._lookups.close()
