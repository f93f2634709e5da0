"""Finding segments: runs of a prompt's tokens that stand somewhere in a stored text.

The fingerprints of the prompt are looked up (`segment_index`); at each one found, the texts that
have it are followed both ways as far as they agree with the prompt, token by token
(`segment_text`). Of the runs found the best are chosen so that none overlap.

What must hold: as long as no limit below is reached, each stretch of ``min_tokens`` tokens that the
index knows touches a segment of the result; each segment agrees with stored rows of its namespace
and salt token by token. The work is bounded: one look-up for each different fingerprint of the
prompt (one in 21 tokens), ROWS_MAX rows and two for each chunk of the prompt, SWEEPS_MAX passes.
Read-only and lock-free: what is evicted meanwhile is not found, or a miss when it is read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from prefixstore.errors import ConfigError
from prefixstore.keys import (
    KEY_BYTES,
    ChunkRef,
    MultimodalItem,
    Tokens,
    salt_digest,
    token_bytes,
)
from prefixstore.ledger import DISK, MEMORY
from prefixstore.rows import FLAG_ALONE
from prefixstore.segment_index import children_of, unpack_sources
from prefixstore.segment_text import Prompt, RowOf, Run, Texts
from prefixstore.winnow import GRAM_TOKENS, SPAN_TOKENS, fingerprints, seed_of

if TYPE_CHECKING:
    from prefixstore.namespace import Namespace

MIN_SEGMENT_TOKENS = SPAN_TOKENS
ROWS_MAX = 4096  # looked at in one search, besides two for each chunk of the prompt
SWEEPS_MAX = 4
SAMPLE = 8  # of so many fingerprints one is looked up before the others
_UNKNOWN, _DONE, _FOUND, _FOUND_ALONE = -1, 0, 1, 2  # a fingerprint of the prompt
_NO_TOKEN = -1  # in place of the tokens of a multimodal item: no stored text has it

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
Chosen = tuple[Run, int, int]  # a run, and the part of it that is used


class Piece(NamedTuple):
    """A part of a chunk: ``num_tokens`` tokens of it from token ``offset`` on."""

    ref: ChunkRef
    offset: int
    num_tokens: int
    tier: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``[start, start + num_tokens)`` of the prompt, and where their KV is."""

    start: int
    num_tokens: int
    source_start: int  # place of the first token in the prompt it was computed in
    alone: bool  # whether that prompt was stored as encoded alone
    refs: tuple[ChunkRef, ...]  # the chunks it stands in, in order
    tiers: tuple[int, ...]  # the fastest that has each
    chunk_tokens: int

    @property
    def stop(self) -> int:
        """Place behind the last token."""
        return self.start + self.num_tokens

    @property
    def pieces(self) -> list[Piece]:
        """The part of each chunk, in order; all but the first begin with their chunk."""
        offset, left = self.source_start % self.chunk_tokens, self.num_tokens
        pieces = []
        for ref, tier in zip(self.refs, self.tiers, strict=True):
            count = min(self.chunk_tokens - offset, left)
            pieces.append(Piece(ref, offset, count, tier))
            offset, left = 0, left - count
        return pieces


def find_segments(
    namespace: Namespace,
    tokens: Tokens,
    salt: bytes,
    start: int,
    min_tokens: int,
    items: Sequence[MultimodalItem],
) -> list[Segment]:
    """See `Namespace.find_segments`."""
    if min_tokens < MIN_SEGMENT_TOKENS:
        raise ConfigError(
            f"min_tokens={min_tokens}: shorter runs than {MIN_SEGMENT_TOKENS} may have no "
            "fingerprint",
            f"give {MIN_SEGMENT_TOKENS} or more",
        )
    if start < 0:
        raise ConfigError(f"start={start}", "give the number of tokens that are found already")
    store = namespace.store
    store.check_open()
    prompt = _prompt_of(tokens, start, items)
    salt_name = salt_digest(salt)
    scope = namespace.identity.namespace + salt_name
    size = namespace.layout.chunk_tokens
    rows_max = ROWS_MAX + 2 * (len(prompt) // size)
    env = store.index if store.has_disk else store.live
    memory: set[bytes] = set()  # keys found there
    with (
        env.lookup("segment") as sources_of,
        env.lookup("chunk") as on_disk,
        store.live.lookup("chunk") as in_memory,
        env.read() as txn,
    ):

        def row_of(key: bytes) -> bytes | None:
            row = in_memory(key)
            if row is None:
                return on_disk(key)
            memory.add(key)
            return row

        texts = Texts(row_of, children_of(txn), scope, size, time.time(), rows_max)
        chosen = _Search(prompt, texts, sources_of, min_tokens).run()
    return [
        _segment(run, first, stop, start, size, salt_name, memory)
        for run, first, stop in sorted(chosen, key=itemgetter(1))
    ]


def _prompt_of(
    tokens: Tokens, start: int, items: Sequence[MultimodalItem]
) -> npt.NDArray[np.int32]:
    prompt = np.frombuffer(token_bytes(tokens), "<i4")[start:]
    if items:
        prompt = prompt.copy()
    for item in items:
        stop = item.offset + item.num_tokens - start
        prompt[max(0, item.offset - start) : max(0, stop)] = _NO_TOKEN
    return prompt


class _Search:
    """One search: the fingerprints looked up, the runs followed so far, the best of them."""

    def __init__(
        self,
        prompt: npt.NDArray[np.int32],
        texts: Texts,
        sources_of: RowOf,
        min_tokens: int,
    ) -> None:
        self._prompt, self._texts, self._min_tokens = Prompt(prompt, texts), texts, min_tokens
        self._sources_of = sources_of
        self._places, self._hashes = fingerprints(prompt, seed_of(texts.scope))
        self._state = np.full(len(self._places), _UNKNOWN, np.int8)
        self._sources: dict[int, bytes] = {}  # by hash
        self._runs: list[Run] = []
        self._chosen: list[Chosen] = []
        self._taken = np.zeros(len(prompt), np.bool_)

    def run(self) -> list[Chosen]:
        """The runs to be used, cut so that none overlap.

        A few fingerprints are looked up first: what lies in the runs they lead to need not be,
        which saves half the time for a prompt that is all there. Sources that were encoded alone
        are followed before the others: so a run of them is found though a longer one goes over it,
        if it is long enough to have one of the few (some 170 tokens). Places where in the end a run
        was cut away are followed again.
        """
        looked_at = np.arange(0, len(self._places), SAMPLE)
        for _ in range(SWEEPS_MAX):
            self._look_up(looked_at)
            self._follow(_FOUND_ALONE)
            self._follow(_FOUND)
            looked_at = self._free(self._state == _UNKNOWN)
            left = len(looked_at) or len(self._free(self._state >= _FOUND))
            if not left or self._texts.rows_left <= 0:
                break
        return self._chosen

    def _free(self, which: Mask) -> Indices:
        """Those places, of some, that no chosen run has."""
        places = self._places
        taken = self._taken[places] | self._taken[places + GRAM_TOKENS - 1]
        return np.flatnonzero(which & ~taken)

    def _look_up(self, which: Indices) -> None:
        # Sorted, so that neighbours in the table are read one after the other.
        names, name_of = np.unique(self._hashes[which], return_inverse=True)
        found = list(map(self._sources_of, names.astype(">u8").view("V8").tolist()))
        hits = [i for i, data in enumerate(found) if data is not None]
        states = np.full(len(names), _DONE, np.int8)
        for i, name in zip(hits, names[hits].tolist(), strict=True):
            data = found[i] or b""
            states[i] = _FOUND_ALONE if data[0] < 128 else _FOUND
            self._sources[name] = data
        self._state[which] = states[name_of]

    def _follow(self, state: int) -> None:
        """Follow the sources at places in this state or a better one, first places first."""
        which = self._free(self._state >= state)
        places = self._places[which]
        at = 0
        while at < len(which) and self._texts.rows_left > 0:
            reach, last = 0, int(places[at]) + GRAM_TOKENS - 1
            for source in unpack_sources(self._sources[int(self._hashes[which[at]])]):
                if state == _FOUND_ALONE and not source.alone:
                    break
                run = self._prompt.run(source.key, last - source.offset, last)
                if run is not None and run.stop - run.start >= self._min_tokens:
                    self._runs.append(run)
                    reach = max(reach, run.stop)
            self._state[which[at]] = state - 1
            at = max(at + 1, int(np.searchsorted(places, reach - GRAM_TOKENS + 1)))
        if at:
            self._chosen = self._choose()

    def _choose(self) -> list[Chosen]:
        """The best runs first, each cut to what the better ones leave of it."""
        chosen: list[Chosen] = []
        self._taken[:] = False
        for run in sorted(self._runs, key=lambda run: (not run.alone, run.start - run.stop)):
            for start, stop in _gaps(self._taken, run.start, run.stop):
                if stop - start >= self._min_tokens:
                    self._taken[start:stop] = True
                    chosen.append((run, start, stop))
        return chosen


def _gaps(taken: Mask, start: int, stop: int) -> list[list[int]]:
    """The parts of ``[start, stop)`` that are not taken."""
    within = taken[start:stop]
    if not within.any():
        return [[start, stop]]
    edges = np.flatnonzero(np.diff(within, prepend=True, append=True)) + start
    pairs: list[list[int]] = edges.reshape(-1, 2).tolist()
    return pairs


def _segment(
    run: Run,
    start: int,
    stop: int,
    before: int,
    size: int,
    salt: bytes,
    memory: set[bytes],
) -> Segment:
    """Places ``[start, stop)`` of a run as a segment of a prompt with ``before`` more tokens."""
    skipped = (start - run.first) // size
    used = slice(skipped, -(-(stop - run.first) // size))
    keys, rows = run.keys[used], run.rows[used]
    preimages = [row[-KEY_BYTES - 4 * size :] for row in rows]
    depth = int.from_bytes(rows[0][4:8], "little")
    refs = tuple(map(ChunkRef, keys, preimages, range(depth, depth + len(keys)), repeat(salt)))
    tiers = tuple(MEMORY if key in memory else DISK for key in keys)
    alone = all(row[1] & FLAG_ALONE for row in rows)
    source_start = (depth - skipped) * size + start - run.first
    return Segment(before + start, stop - start, source_start, alone, refs, tiers, size)
