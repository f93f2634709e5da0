"""Warming's loop: batches of prompts through an engine, until their chunks are on disk.

What must hold: a batch's own KV, and what is stored only to measure it, each take at most
`Target.batch_bytes`, so in a folder neither pushes out what the batch before stored; what was
stored to measure is removed with its batch (after a crash it expires). Nothing is believed to be
stored because it was computed: the store is asked. A crash at any point leaves whole chunks, which
the next run finds; what it had not measured is measured then.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from prefixstore.errors import ConfigError, StoreTimeoutError
from prefixstore.keys import ChunkRef
from prefixstore.warm_contexts import CONTEXTS
from prefixstore.warm_held import Held
from prefixstore.warm_manifest import Manifest
from prefixstore.warm_measure import Measured, Place
from prefixstore.warm_plan import Engine, Piece, Text

BATCH_PIECES = 256
ATTEMPTS = 4  # a chunk is dropped when staging or tier are full just then
SETTLE_S = 3.0  # without a new chunk: the rest was dropped
DURABLE_S = 120.0  # without a new chunk on disk: it is stalled
FLUSH_S = 1.0
MEASURING_TTL_S = 3600.0
MEASURING_TAG = "prefixstore-warm-measuring"
_REMOVE_CHUNKS = 1024  # at a time


class Computer(Protocol):
    """An engine that stores what it computes: `connector.warming.WarmingEngine`."""

    facts: Engine

    def salt(self, text: str) -> bytes:
        """The salt of the keys of requests whose option ``salt`` is ``text``."""

    def compute(self, prompts: Sequence[tuple[list[int], dict[str, Any]]]) -> Iterator[int]:
        """Compute prompts, with options; yields the index of each as it ends."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Tokens are those of all prompts, of those that measure too."""

    done_tokens: int
    total_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """The speed so far."""
        return self.done_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at this speed; None as long as there is none."""
        speed = self.tokens_per_s
        return (self.total_tokens - self.done_tokens) / speed if speed else None


@dataclass(frozen=True, slots=True)
class Labels:
    """What the chunks are stored with; ``tag`` None is the document's name."""

    tag: str | None = None
    ttl_s: float | None = None
    pin: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """A prompt to compute and the chunks that must be there afterwards."""

    ids: list[int]
    options: dict[str, Any]
    refs: list[ChunkRef]


@dataclass
class Warmer:
    """See the module docstring. ``unmeasured`` says why, by the place of the piece in ``pieces``
    (only what was tried in vain)."""

    held: Held
    engine: Computer
    texts: Sequence[Text]
    pieces: Sequence[Piece]
    labels: Labels
    manifest: Manifest | None
    progress: Callable[[Progress], None] | None = None
    unmeasured: dict[int, str] = field(default_factory=dict)
    computed_tokens: int = 0

    def __post_init__(self) -> None:
        self._salt = secrets.token_hex(16)  # nobody else's keys have it
        self._to_remove: list[ChunkRef] = []
        self._total = 0
        self._began = time.monotonic()

    def run(self) -> None:
        """Compute, store and measure what is missing. Raises StoreError, KeyboardInterrupt."""
        todo = []
        for index, piece in enumerate(self.pieces):
            compute, measuring = self.held.look(piece).needs(piece)
            self._total += compute * len(piece.prompt) + measuring * piece.measuring_tokens
            if compute or measuring:
                todo.append((index, compute, measuring))
        self._began = time.monotonic()
        for batch in self._batches(todo):
            self._batch(batch)

    def _batches(
        self, todo: Sequence[tuple[int, bool, bool]]
    ) -> Iterator[list[tuple[int, bool, bool]]]:
        most = self.held.target.batch_bytes // self.held.namespace.layout.slot_bytes
        batch: list[tuple[int, bool, bool]] = []
        own = measuring = 0
        for entry in todo:
            piece = self.pieces[entry[0]]
            more = entry[1] * piece.num_chunks, entry[2] * piece.measuring_chunks
            full = own + more[0] > most or measuring + more[1] > most
            if batch and (full or len(batch) == BATCH_PIECES):
                yield batch
                batch, own, measuring = [], 0, 0
            batch.append(entry)
            own, measuring = own + more[0], measuring + more[1]
        if batch:
            yield batch

    def _batch(self, batch: Sequence[tuple[int, bool, bool]]) -> None:
        alone = [self._alone(self.pieces[index]) for index, compute, _ in batch if compute]
        missing = self._compute(alone)
        if alone and len(missing) == len(alone):
            raise ConfigError(
                "the engine stored nothing of what it computed",
                "is the store full or pinned? VLLM_LOGGING_LEVEL=INFO shows what the engine says",
            )
        # One round for each context: those behind the same one find it in the engine's own cache.
        measured = {index: self._measured(index) for index, _, wanted in batch if wanted}
        for number in range(CONTEXTS):
            self._round(number, measured)
        for index, one in measured.items():
            values = one.values()
            if values is None:
                self.unmeasured[index] = one.failed
            elif self._note(one.alone.refs, values) < len(values):
                self.unmeasured[index] = "chunks of it were evicted"
        if self.manifest is not None:
            entries = [
                self.held.entry(self.texts[piece.document], piece, self.labels.tag)
                for piece in (self.pieces[index] for index, _, _ in batch)
            ]
            self.manifest.append(entry for entry in entries if entry is not None)

    def _note(self, refs: Sequence[ChunkRef], values: npt.NDArray[np.float32]) -> int:
        held = self.held
        return held.target.call(lambda: held.namespace.note_staleness(refs, values))

    def _alone(self, piece: Piece) -> _Job:
        text, labels = self.texts[piece.document], self.labels
        options: dict[str, Any] = {
            "alone": True,
            "tag": text.tag if labels.tag is None else labels.tag,
            "pin": labels.pin,
            # Of one that is there in part the rest comes out of the same pass as what is there.
            "read": self.held.look(piece).chunks == 0,
        }
        if labels.ttl_s is not None:
            options["ttl_s"] = labels.ttl_s
        return _Job(piece.prompt, options, self.held.refs(piece))

    # ------------------------------------------------------------------ computing
    def _compute(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Compute until all is stored; returns what could not be."""
        left = list(jobs)
        for attempt in range(ATTEMPTS):
            if attempt:
                self._total += sum(len(job.ids) for job in left)
            for done in self.engine.compute([(job.ids, job.options) for job in left]):
                self.computed_tokens += len(left[done].ids)
                if self.progress is not None:
                    seconds = time.monotonic() - self._began
                    self.progress(Progress(self.computed_tokens, self._total, seconds))
            left = self._wait(left)
            if not left:
                break
        return left

    def _wait(self, jobs: list[_Job]) -> list[_Job]:
        """Wait until the chunks are on disk; returns the jobs some of whose were dropped.

        Raises StoreTimeoutError when the disk stands still.
        """
        target = self.held.target
        last, before = time.monotonic(), (-1, -1)
        while True:
            counts = [self.held.missing(job.refs) for job in jobs]
            dropped, unsafe = (sum(count[i] for count in counts) for i in range(2))
            all_there = not dropped and not unsafe
            if all_there and (not jobs or target.knows_disk or target.written(FLUSH_S)):
                return []
            now = time.monotonic()
            if (dropped, unsafe) != before:
                last, before = now, (dropped, unsafe)
            if dropped and unsafe <= dropped and now - last > SETTLE_S:
                return [job for job, count in zip(jobs, counts, strict=True) if any(count)]
            if now - last > DURABLE_S:
                raise StoreTimeoutError(
                    f"{unsafe or 'the'} chunks did not reach the disk within {DURABLE_S:.0f} s",
                    "is it full or stalled? run again to go on",
                )
            if not (unsafe > dropped and target.written(FLUSH_S)):
                time.sleep(target.poll_s)

    # ------------------------------------------------------------------ measuring
    def _measured(self, index: int) -> Measured:
        piece = self.pieces[index]
        start = piece.first_chunk * piece.chunk_tokens
        own = Place(self.held.refs(piece)[piece.first_chunk :], start)
        config = self.engine.facts.config
        return Measured(self.held.namespace, config, own, len(piece.preamble) - start)

    def _round(self, number: int, measured: Mapping[int, Measured]) -> None:
        """Compute pieces behind their context of that number, compare, remove what that stored."""
        options = {"salt": self._salt, "tag": MEASURING_TAG, "ttl_s": MEASURING_TTL_S}
        salt = self.engine.salt(self._salt)
        jobs: dict[int, _Job] = {}
        for index in measured:
            piece = self.pieces[index]
            if number < len(piece.contexts):
                ids = piece.behind(piece.contexts[number])
                jobs[index] = _Job(ids, options, self.held.namespace.chain(ids, salt).refs())
        self._to_remove = [ref for job in jobs.values() for ref in job.refs]
        self._compute(list(jobs.values()))
        for index, job in jobs.items():
            piece = self.pieces[index]
            at = piece.first_chunk + len(piece.contexts[number]) // piece.chunk_tokens
            measured[index].compare(Place(job.refs[at:], at * piece.chunk_tokens))
        self.held.target.call(self.clean_up)

    def clean_up(self) -> None:
        """Remove what was stored only to measure. After a run that was interrupted, call it when
        the engine has ended: until then it stores what it has staged. Raises StoreError."""
        refs = self._to_remove
        for at in range(0, len(refs), _REMOVE_CHUNKS):
            self.held.namespace.delete(refs[at : at + _REMOVE_CHUNKS])
        self._to_remove = []
