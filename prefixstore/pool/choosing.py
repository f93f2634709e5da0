"""Whether a namespace's chunks are coded; ``auto`` finds out whether it pays.

What decides is how long a get takes, since somebody waits for it: a codec pays if the network takes
longer for the bytes that it saves than decoding takes. So the first chunks that are put are stored
as they are, read back, encoded and decoded, and the figures compared (`judge`): the best of some
tries, since what disturbs one (a busy core, a burst of others' traffic) only makes it look slower
than it is. Networks change: that is done again every RENEW_S. A process that only reads decides
nothing; it reads both.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from prefixstore.codec import AUTO, LOSSLESS, NONE, lossless
from prefixstore.errors import RemoteError
from prefixstore.keys import ChunkRef
from prefixstore.pool.reading import State, read_heads, read_plain
from prefixstore.reading import helpers_for, share_out

if TYPE_CHECKING:
    from prefixstore.pool.namespace import PooledNamespace

logger = logging.getLogger("prefixstore")
RENEW_S = 600.0
RETRY_S = 60.0  # after a measurement that failed
MEASURED_BYTES_MAX = 8 << 20  # or one chunk
_TIMES = 3
_SLOW_S = 0.3  # of a try
GAIN_MIN = 0.05  # of a get; less is not worth the work
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of some chunks together; seconds of the best try."""

    plain_bytes: int
    coded_bytes: int
    get_s: float  # as they are, checked
    round_trip_s: float  # one more is needed for what is coded
    encode_s: float
    decode_s: float  # by as many threads as a get has

    @property
    def ratio(self) -> float:
        """Bytes that are left of one."""
        return self.coded_bytes / self.plain_bytes

    @property
    def coded_get_s(self) -> float:
        """How long a get of them would take if they were coded."""
        return self.get_s * self.ratio + self.round_trip_s + self.decode_s


class Verdict(NamedTuple):
    """What came out, and why, for people."""

    pays: bool
    why: str


def judge(figures: Figures) -> Verdict:
    """Whether gets become faster with the lossless codec, by GAIN_MIN or more. Pure."""
    if figures.coded_bytes >= figures.plain_bytes:
        return Verdict(False, f"nothing gets smaller with {LOSSLESS}")
    pays = figures.coded_get_s < (1 - GAIN_MIN) * figures.get_s
    size = figures.plain_bytes
    why = (
        f"a get of {size / 2**20:.2f} MiB takes {1000 * figures.get_s:.1f} ms as it is and "
        f"{1000 * figures.coded_get_s:.1f} ms with {LOSSLESS} ({figures.ratio:.2f} of "
        f"the bytes, encoded at {size / figures.encode_s / 1e9:.2f} GB/s, decoded at "
        f"{size / figures.decode_s / 1e9:.2f})"
    )
    return Verdict(pays, why)


class Choice:
    """What was chosen for a namespace. Thread-safe."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.verdict: Verdict | None = None  # of ``auto``
        self._until = 0.0  # monotonic
        self._lock = threading.Lock()

    @property
    def encodes(self) -> bool:
        """Whether chunks are to be coded that are put now."""
        if self.codec != AUTO:
            return self.codec != NONE
        return self.verdict is not None and self.verdict.pays and time.monotonic() < self._until

    def learn(
        self, ns: PooledNamespace, refs: Sequence[ChunkRef], payloads: Sequence[memoryview]
    ) -> None:
        """Chunks were stored as they are: measure with them, if it is time to."""
        with self._lock:
            if self.codec != AUTO or not refs or time.monotonic() < self._until:
                return
            self._until = time.monotonic() + RETRY_S
        try:
            figures = measure(ns, refs, payloads)
        except RemoteError as error:
            logger.info("prefixstore: whether a codec pays is not known yet: %s", error)
            return
        if figures is None:
            return
        self.verdict = judge(figures)
        self._until = time.monotonic() + RENEW_S
        logger.info(
            "prefixstore: codec %s for %s: %s",
            LOSSLESS if self.verdict.pays else NONE, ns.backend.url, self.verdict.why,
        )  # fmt: skip


def measure(
    ns: PooledNamespace, refs: Sequence[ChunkRef], payloads: Sequence[memoryview]
) -> Figures | None:
    """Figures of chunks that are in the pool as they are; None if they have gone. Raises
    RemoteError."""
    layout, form = ns.layout, ns.form
    count = min(len(refs), max(1, MEASURED_BYTES_MAX // layout.payload_bytes))
    refs, payloads = refs[:count], payloads[:count]
    outs = [memoryview(bytearray(layout.payload_bytes)) for _ in refs]

    def end() -> float:
        return time.monotonic() + ns.store.deadline_s

    get_s, states = _timed(lambda: read_plain(ns, refs, outs, layout.whole, end()))
    if set(states) != {State.GOOD}:
        return None
    round_trip_s, _ = _timed(lambda: read_heads(ns, refs, end()))
    encode_s, encoded = _timed(lambda: [lossless.encode(form, one) for one in payloads])
    coded = [[memoryview(piece) for piece in pieces] for pieces in encoded if pieces is not None]

    def decode_one(i: int) -> None:
        lossless.decode(form, coded[i], outs[i])

    helpers = helpers_for(len(coded) * layout.payload_bytes)

    def decode() -> None:
        share_out(len(coded), decode_one, ns.store.helpers, helpers)

    decode_s, _ = _timed(decode)
    kept = sum(piece.nbytes for pieces in coded for piece in pieces)
    kept += (count - len(coded)) * layout.payload_bytes
    plain_bytes = count * layout.payload_bytes
    return Figures(plain_bytes, kept, get_s, round_trip_s, encode_s, decode_s)


def _timed(work: Callable[[], _Result]) -> tuple[float, _Result]:
    """Seconds of the best try, and what the last gave. What is slow is tried once: that the
    network's moods count less there, and more tries would be late."""
    seconds = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
        if seconds[-1] > _SLOW_S:
            break
    return min(seconds), result
