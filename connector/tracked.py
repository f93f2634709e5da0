"""One request, as the scheduler half of the connector knows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from connector import compat
from connector.blend_claims import Claim
from connector.blend_options import BlendOptions
from connector.groups import KvGroup, blocks_of_chunks, first_savable, have_windows
from connector.lookup import Lookup
from connector.messages import RowsJob, SaveJob, SplitJob, StateLoad
from connector.options import RequestOptions
from connector.states import StateForm
from prefixstore.identity import ModelIdentity
from prefixstore.keys import KeyChain


@dataclass
class Tracked:
    """What is known of a request. ``tables``: its blocks, in each of ``groups``."""

    request: Any
    options: RequestOptions
    identity: ModelIdentity
    chain: KeyChain
    groups: Sequence[KvGroup]
    form: StateForm | None = None  # of the model's states, if it has any
    states: KeyChain | None = None  # the chain by which they are stored
    tables: list[list[int]] = field(default_factory=list)
    next_save: int = 0
    lookup: Lookup = field(default_factory=Lookup)
    promised: tuple[int, int] = (0, 0)  # chunks [start, stop) vLLM was told will be loaded
    loading: bool = False
    blend: BlendOptions | None = None
    claim: Claim | None = None  # set when what was promised includes segments
    front: float = 0.0  # set when part of it is computed meanwhile: how much, by what is known
    isolated_from: int | None = None  # from here its blocks have names of their own
    blended: bool = False  # its KV is from now on its own: never saved
    may_load: bool = True
    cut: bool = False  # its load was ended early: what it did not load is stored all the same
    outcome: str = ""  # why nothing will be loaded, to be counted when the request is admitted
    error: str = ""
    began_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.lookup.request_id = self.request.request_id
        self.lookup.traceparent = compat.traceparent(self.request)

    def waits(self, num_chunks: int) -> bool:
        """Whether it had rather look again than go on with so many chunks of its prompt."""
        wait_s = self.options.wait_ms / 1000
        return num_chunks < len(self.chain) and time.monotonic() - self.began_at < wait_s

    def extend(self) -> None:
        """Give the chain the tokens that are known by now."""
        known = self.chain.num_tokens
        if self.request.num_tokens > known:
            new = compat.token_ids(self.request, known)
            self.chain.extend(new)
            if self.states is not None:
                self.states.extend(new)

    def blocks_of(self, start: int, stop: int) -> list[list[int]]:
        """The blocks of chunks ``[start, stop)``, a row for each."""
        return blocks_of_chunks(self.groups, self.tables, self.chain.chunk_tokens, start, stop)

    def take_blocks(self, by_group: Sequence[Sequence[int]], replace: bool = True) -> None:
        """Its blocks, by vLLM's number of the group; or those that came in addition."""
        new = [list(by_group[group.index]) for group in self.groups]
        known = [[] for _ in new] if replace else self.tables
        self.tables = [old + more for old, more in zip(known, new, strict=True)]

    def rows_job(self, computed: int) -> RowsJob | None:
        """What of the load, behind that many tokens, is computed while it goes on, if any is."""
        if self.claim is not None:
            return self.claim.job(self.request.prompt_token_ids, self.tables[0])
        if not self.front:
            return None
        end = self.promised[1] * self.chain.chunk_tokens
        blocks = self.tables[0][: end // self.groups[0].block_tokens]
        return SplitJob(list(compat.token_ids(self.request, 0)[:end]), computed, blocks)

    def chunks_to_load(self, num_tokens: int) -> int | None:
        """How many of its chunks may be loaded, at most; None for any number.

        vLLM computes at least the last token of a prompt. What a window needs for it is not there
        when the load ends behind it, and a state would see it twice.
        """
        some = have_windows(self.groups) or self.form is not None
        return (num_tokens - 1) // self.chain.chunk_tokens if some else None

    def isolate(self, exact: int, isolate: Callable[[Any, int], None]) -> bool:
        """It will be blended behind ``exact`` tokens: name its blocks there apart from others'.

        vLLM's prefix cache then gives nobody what is blended, and gives it nothing of others' that
        would make its answer depend on who asked before. Whether this was the first time.
        """
        known = self.isolated_from
        if known is None or exact < known:
            isolate(self.request, exact)
            self.isolated_from = exact
        return known is None

    def note_failure(self, invalid: set[int]) -> None:
        """Blocks that could not be loaded are perhaps its own.

        Ranks report failed blocks at once, the end of a load when all of them are done.
        """
        if self.claim is not None and not invalid.isdisjoint(self.tables[0]):
            self.may_load = False
            return
        for index in range(*self.promised):
            if not invalid.isdisjoint(self.blocks_of(index, index + 1)[0]):
                # The chunk was damaged or gone. It will be computed, so it can be stored again; and
                # this request must not be promised it once more, for that could go on for ever.
                if not self.cut:
                    self.next_save = min(self.next_save, index)
                self.may_load = False
                return

    def note_failed_load(self) -> None:
        """Its load failed as a whole: all of it may be stored again, none is loaded again."""
        if not self.cut:
            self.next_save = min(self.next_save, self.promised[0])
        self.promised = (0, 0)  # nor was the state behind it loaded
        self.may_load = False

    def save_job(self, computed_tokens: int, step_start: int = 0) -> SaveJob | None:
        """The chunks that are complete after this step and whose token ids are known."""
        start = max(self.next_save, first_savable(self.groups, self.chain.chunk_tokens, step_start))
        stop = min(computed_tokens, self.request.num_tokens) // self.chain.chunk_tokens
        if stop <= start or self.blended:
            return None
        self.extend()
        self.next_save = stop
        options = self.options
        return SaveJob(
            self.request.request_id,
            self.chain.namespace,
            self.chain.refs(start, stop),
            self.blocks_of(start, stop),
            options.ttl_s,
            options.tag,
            options.pin,
            options.alone,
        )

    def save_jobs(
        self, computed_tokens: int, step_start: int, places: Mapping[int, Mapping[int, int]]
    ) -> Iterator[SaveJob]:
        """What this step completes; the states first, so that who waits for the KV can use it."""
        yield from self.state_jobs(places)
        job = self.save_job(computed_tokens, step_start)
        if job is not None:
            yield job

    def state_load(self, stop: int, tables: Sequence[Sequence[int]]) -> StateLoad | None:
        """The states behind that many chunks, for a load that ends there."""
        if self.form is None or self.states is None:
            return None
        blocks = self.form.blocks_at(tables, stop * self.chain.chunk_tokens)
        return StateLoad(self.states.namespace, self.states.refs(stop - 1, stop)[0], blocks)

    def state_jobs(self, places: Mapping[int, Mapping[int, int]]) -> Iterator[SaveJob]:
        """What to save of states: ``places`` are numbers of tokens behind which this step leaves
        them, with the block of each of vLLM's groups."""
        if self.form is None or self.states is None or not places:
            return
        self.extend()
        for num_tokens, by_group in places.items():
            count, rest = divmod(num_tokens, self.chain.chunk_tokens)
            whole = all(group.index in by_group for group in self.form.groups)
            if rest or not whole or not 0 < count <= len(self.states) or count == self.promised[1]:
                continue  # not a chunk's end, or what was loaded itself
            yield SaveJob(
                self.request.request_id,
                self.states.namespace,
                self.states.refs(count - 1, count),
                [[by_group[group.index] for group in self.form.groups]],
                self.options.ttl_s,
                self.options.tag,
                self.options.pin,
                False,
                of_states=True,
            )
