"""Finding segments: runs of a prompt's tokens that stand somewhere in a stored text.

The fingerprints of the prompt are looked up (`segment_index`); at each one found, the texts that
have it are followed both ways as far as they agree with the prompt, token by token
(`segment_text`). Of the runs found the best are chosen so that none overlap.

What must hold: as long as no limit below is reached, each stretch of ``min_tokens`` tokens that the
index knows touches a segment of the result; each segment agrees with stored rows of its namespace
and salt token by token. The work is bounded: one look-up for each different fingerprint of the
prompt (one in 21 tokens), ROWS_MAX rows and two for each chunk of the prompt, SWEEPS_MAX passes;
then one look-up for each chunk found, of whether the memory tier has it.
Read-only and lock-free: what is evicted meanwhile is not found, or a miss when it is read.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from prefixstore.errors import ConfigError
from prefixstore.index import Environment, Txn
from prefixstore.keys import ChunkRef, MultimodalItem, Tokens, salt_digest, token_bytes
from prefixstore.ledger import DISK, MEMORY
from prefixstore.rows import FLAG_ALONE
from prefixstore.segment_index import children_of, unpack_sources
from prefixstore.segment_text import Prompt, Run, Texts
from prefixstore.winnow import GRAM_TOKENS, SPAN_TOKENS, fingerprints, seed_of

if TYPE_CHECKING:
    from prefixstore.namespace import Namespace

MIN_SEGMENT_TOKENS = SPAN_TOKENS
ROWS_MAX = 4096  # looked at in one search, besides two for each chunk of the prompt
SWEEPS_MAX = 4
SAMPLE = 8  # of so many fingerprints one is looked up before the others
_UNKNOWN, _DONE, _FOUND, _FOUND_ALONE = -1, 0, 1, 2  # a fingerprint of the prompt
_IN_MEMORY = b"%c" % MEMORY  # before the key of a chunk of that tier, in table "heat"
_NOWHERE = -(1 << 62)  # no text begins at this place of the prompt
_new_ref = partial(tuple.__new__, ChunkRef)  # of its four fields; twice as fast as by their names
_NO_TOKEN = -1  # in place of the tokens of a multimodal item: no stored text has it

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]
TiersOf = Callable[[list[bytes]], list[int]]  # of keys
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
    store = namespace.store
    store.check_open(namespace.name)
    question = Question(
        namespace.name, namespace.layout.chunk_tokens, tokens, salt, start, min_tokens, items
    )

    def tiers_of(keys: list[bytes]) -> list[int]:
        with store.live.read() as live:
            memory = live.get_many("heat", sorted(_IN_MEMORY + key for key in keys))
        return [MEMORY if _IN_MEMORY + key in memory else DISK for key in keys]

    return search(store.index if store.has_disk else store.live, question, tiers_of)


class Question(NamedTuple):
    """What is asked of an index: see `Namespace.find_segments`."""

    namespace: bytes
    chunk_tokens: int
    tokens: Tokens
    salt: bytes
    start: int
    min_tokens: int
    items: Sequence[MultimodalItem]


def search(env: Environment, asked: Question, tiers_of: TiersOf) -> list[Segment]:
    """Search an index that has tables ``chunk`` and those of `segment_index`; ``tiers_of`` says
    where chunks are read from. Raises ConfigError."""
    if asked.min_tokens < MIN_SEGMENT_TOKENS:
        raise ConfigError(
            f"min_tokens={asked.min_tokens}: shorter runs than {MIN_SEGMENT_TOKENS} may have no "
            "fingerprint",
            f"give {MIN_SEGMENT_TOKENS} or more",
        )
    if asked.start < 0:
        raise ConfigError(
            f"start={asked.start}", "give the number of tokens that are found already"
        )
    prompt = _prompt_of(asked.tokens, asked.start, asked.items)
    salt_name, size = salt_digest(asked.salt), asked.chunk_tokens
    scope = asked.namespace + salt_name
    rows_max = ROWS_MAX + 2 * (len(prompt) // (4 * size))
    with env.lookup("chunk") as row_of, env.read() as txn:
        texts = Texts(row_of, children_of(txn), scope, size, time.time(), rows_max)
        chosen = _Search(prompt, texts, txn, asked.min_tokens).run()
    keys = list(dict.fromkeys(key for run, _, _ in chosen for key in run.keys))
    tiers = dict(zip(keys, tiers_of(keys), strict=True))
    return [
        _segment(run, first, stop, asked.start, size, salt_name, tiers)
        for run, first, stop in sorted(chosen, key=itemgetter(1))
    ]


def _prompt_of(tokens: Tokens, start: int, items: Sequence[MultimodalItem]) -> bytes:
    data = token_bytes(tokens)[4 * start :]
    if not items:
        return data
    prompt = np.frombuffer(data, "<i4").copy()
    for item in items:
        stop = item.offset + item.num_tokens - start
        prompt[max(0, item.offset - start) : max(0, stop)] = _NO_TOKEN
    return prompt.tobytes()


class _Search:
    """One search: the fingerprints looked up, the runs followed so far, the best of them."""

    def __init__(
        self,
        prompt: bytes,
        texts: Texts,
        txn: Txn,
        min_tokens: int,
    ) -> None:
        self._prompt, self._texts, self._min_tokens = Prompt(prompt, texts), texts, min_tokens
        self._txn = txn
        self._places, self._hashes = fingerprints(
            np.frombuffer(prompt, "<i4"), seed_of(texts.scope)
        )
        self._state = np.full(len(self._places), _UNKNOWN, np.int8)
        self._sources: dict[bytes, bytes] = {}  # by fingerprint
        # Where in the prompt the text of the best source would begin; one encoded alone elsewhere.
        self._origins = np.zeros(len(self._places), np.int64)
        self._runs: list[Run] = []
        self._chosen: list[Chosen] = []
        self._taken = np.zeros(self._prompt.num_tokens, np.bool_)

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
        """Look up the fingerprints at those places."""
        hashes = self._hashes[which]
        self._state[which] = _DONE
        # Sorted, so that neighbours in the table are read one after the other.
        keys = np.unique(hashes).astype(">u8").view("V8").tolist()
        found = self._txn.get_many("segment", keys)
        if not found:
            return
        self._sources |= found
        names = np.frombuffer(b"".join(found), ">u8").astype(np.uint64)
        at = np.searchsorted(names[:-1], hashes)  # the last one also if all are smaller
        hit = names[at] == hashes
        which, at = which[hit], at[hit]
        best = np.frombuffer(b"".join(value[:8] for value in found.values()), ">u4").reshape(-1, 2)
        rank, offset = best[at].astype(np.int64).T
        self._state[which] = np.where(rank < 1 << 31, _FOUND_ALONE, _FOUND)
        self._origins[which] = self._places[which] - rank * self._texts.chunk_tokens - offset

    def _follow(self, state: int) -> None:
        """Follow the sources at places in this state or a better one, first places first.

        Places that lie as far from each other as their best sources do are taken for one run: of
        them the last is followed first, since it costs less to go backwards. If that run does not
        reach back to the first place, that one is followed as well.
        """
        which = self._free(self._state >= state)
        places = self._places[which].tolist()
        lasts = np.flatnonzero(np.diff(self._origins[which], append=_NOWHERE)).tolist()
        done = np.zeros(len(which), np.bool_)
        at = 0
        while at < len(which) and self._texts.rows_left > 0:
            reach = 0
            for one in (lasts[bisect_left(lasts, at)], at):
                if done[one]:
                    continue
                done[one] = True
                runs = self._runs_at(which[one], state == _FOUND_ALONE)
                self._runs += runs
                stops = [run.stop for run in runs if run.start <= places[at]]
                if stops:
                    reach = max(stops)
                    break
            at = max(at + 1, bisect_left(places, reach - GRAM_TOKENS + 1))
        self._state[which[done]] = state - 1
        if at:
            self._chosen = self._choose()

    def _runs_at(self, which: int, alone: bool) -> list[Run]:
        """The runs from the sources of one fingerprint that are long enough."""
        last = int(self._places[which]) + GRAM_TOKENS - 1
        runs = []
        fingerprint = int(self._hashes[which]).to_bytes(8, "big")
        for source in unpack_sources(self._sources[fingerprint]):
            if alone and not source.alone:
                break
            run = self._prompt.run(source.key, last - source.offset, last)
            if run is not None and run.stop - run.start >= self._min_tokens:
                runs.append(run)
        return runs

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
    tiers: Mapping[bytes, int],
) -> Segment:
    """Places ``[start, stop)`` of a run as a segment of a prompt with ``before`` more tokens."""
    skipped = (start - run.first) // size
    used = slice(skipped, -(-(stop - run.first) // size))
    keys, depth = run.keys[used], run.depth + skipped
    refs = tuple(map(_new_ref, zip(keys, run.preimages[used], count(depth), repeat(salt))))
    alone = all(flag & FLAG_ALONE for flag in run.flags[used])
    where = tuple(tiers[key] for key in keys)
    source_start = run.depth * size + start - run.first
    return Segment(before + start, stop - start, source_start, alone, refs, where, size)
