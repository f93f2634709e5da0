"""Load or recompute: how much of a hit to load.

Pure arithmetic on measured speeds. A cache must never make a request slower: chunks are loaded only
as far as loading them takes less time than computing them would.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from connector.kept_speed import KeptSpeed
from prefixstore.layout import Layout
from prefixstore.ledger import MEMORY

SMOOTHING = 0.3  # weight of the newest measurement
PREFILL_TOKENS_MIN = 128  # smaller steps measure overhead, not prefill
RETRY_AFTER = 5
PATIENCE_MAX = 1000
PROBE_CHUNKS = 8
FAST = 1 / 3  # of computing: what loads in less is loaded alone
SLICES_COST = 1.1  # computing in slices takes longer than the engine's own steps


@dataclass
class Speeds:
    """Smoothed measurements; a speed that was never measured is None or absent.

    A tier found too slow is not used and so never measured again, though it may have been slow for
    a passing reason (first use, a busy disk). After RETRY_AFTER refusals its speed is forgotten and
    the next hit is a probe of PROBE_CHUNKS, which measures it; each time after twice as many
    refusals, so that a tier that stays slow costs next to nothing.
    """

    prefill_tokens_per_s: float | None = None  # to begin with another engine's, if one is known
    tier_bytes_per_s: dict[int, float] = field(default_factory=dict)
    probing: set[int] = field(default_factory=set)
    _refusals: dict[int, int] = field(default_factory=dict)
    _patience: dict[int, int] = field(default_factory=dict)
    _measured: bool = False  # prefill, by this engine
    tell_prefill: Callable[[float], None] = lambda tokens_per_s: None

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """A step computed that many tokens in that time. The first one counts alone: what another
        engine measured may be of another machine."""
        if tokens >= PREFILL_TOKENS_MIN and seconds > 0:
            old = self.prefill_tokens_per_s if self._measured else None
            self.prefill_tokens_per_s, self._measured = _smooth(old, tokens / seconds), True
            self.tell_prefill(self.prefill_tokens_per_s)

    def saw_load(self, tier: int, bytes_per_s: float) -> None:
        """A load from a tier ran at that speed.

        Times are what is smoothed: a tier that was a thousand times as fast as it is now is known
        to be slow after one load, not after twenty.
        """
        old = self.tier_bytes_per_s.get(tier)
        self.tier_bytes_per_s[tier] = 1 / _smooth(1 / old if old else None, 1 / bytes_per_s)
        self.probing.discard(tier)

    def worthwhile(self, tier: int) -> None:
        """All there was of a tier is loaded: if it is found too slow again, that is news."""
        if tier in self.tier_bytes_per_s:
            self._refusals.pop(tier, None)
            self._patience.pop(tier, None)

    def refused(self, tier: int) -> None:
        """Chunks of a tier were not loaded because it is too slow."""
        self._refusals[tier] = self._refusals.get(tier, 0) + 1
        patience = self._patience.get(tier, RETRY_AFTER)
        if self._refusals[tier] >= patience:
            self._refusals[tier] = 0
            self._patience[tier] = min(2 * patience, PATIENCE_MAX)
            self.tier_bytes_per_s.pop(tier, None)
            self.probing.add(tier)


class StepTimes:
    """What the engine's steps say of prefill; ``ahead`` of them may be begun before one is over."""

    def __init__(self, speeds: Speeds, ahead: int) -> None:
        self._speeds = speeds
        # Begun and not reported: when, tokens. vLLM does not report every one.
        self._steps: deque[tuple[float, int]] = deque(maxlen=ahead)
        self._last_end = 0.0
        self._rows_before = False

    def began(self, tokens: int, *, rows: bool) -> None:
        """A step that computes so many tokens, and ``rows`` of a blend or split besides. Such a
        step says nothing about prefill, nor does the next one with tokens: on a GPU it waits for
        those rows."""
        tells = not (rows or self._rows_before)
        self._rows_before = rows or (self._rows_before and not tokens)
        self._steps.append((time.monotonic(), tokens if tells else 0))

    def ended(self) -> None:
        """The oldest one."""
        if self._steps:
            now, (began, tokens) = time.monotonic(), self._steps.popleft()
            self._speeds.saw_prefill(tokens, now - max(began, self._last_end))
            self._last_end = now


class LoadPlanner:
    """How much of what is stored this engine loads: all, or (``auto``) what is worth it. ``kept``:
    the speed of computing that it begins with, and tells."""

    def __init__(
        self, layout: Layout, beside: int, *, auto: bool, kept: KeptSpeed | None = None
    ) -> None:
        self.speeds = Speeds()
        if kept is not None:
            self.speeds = Speeds(kept.tokens_per_s, tell_prefill=kept.heard)
        self._layout, self._beside, self._auto = layout, beside, auto

    @property
    def chunk_compute_s(self) -> float:
        """What computing a chunk takes, in seconds, for a load to compare itself with; 0 if that
        is not known, or does not matter."""
        prefill = self.speeds.prefill_tokens_per_s
        return self._layout.chunk_tokens / prefill if self._auto and prefill else 0.0

    def worth(self, tiers: Sequence[int], ends: Collection[int] | None = None) -> int:
        """How many leading chunks to load, ``tiers[i]`` being the tier of chunk i; one of ``ends``,
        or 0, if they are given."""
        if not self._auto:
            return len(tiers) if ends is None else max(ends, default=0)
        size, payload = self._layout.chunk_tokens, self._layout.payload_bytes
        return chunks_to_load(tiers, size, payload, self.speeds, self._beside, ends)

    def front(self, tiers: Sequence[int]) -> float:
        """Of chunks in these tiers, the part to compute while the others are loaded, the last one
        first; 0 if they are better loaded alone, or left to the engine.

        Both at once take t = 1 / (1 / t_load + 1 / t_compute). As long as it is not known which is
        faster, all tiers but memory may be slow.
        """
        speeds, prefill = self.speeds.tier_bytes_per_s, self.speeds.prefill_tokens_per_s
        if any(tier != MEMORY and (prefill is None or tier not in speeds) for tier in tiers):
            return 0.5
        if prefill is None or not tiers:
            return 0.0
        payload = self._layout.payload_bytes
        load_s = sum(payload / speeds[tier] for tier in tiers if tier in speeds)
        engine_s = len(tiers) * self._layout.chunk_tokens / prefill
        if load_s <= FAST * engine_s:
            return 0.0
        both_s = 1 / (1 / load_s + 1 / (SLICES_COST * engine_s))
        return both_s / (SLICES_COST * engine_s) if both_s < engine_s else 0.0

    def stop(
        self,
        tiers: Sequence[int],
        computed: int,
        limit: int | None,
        places: Sequence[int] | None,
    ) -> int:
        """Behind which chunk a load ends that begins with the one ``computed`` tokens end in.

        ``tiers`` are those of the chunks from there on, ``limit`` is the most tokens to load.
        ``places``: the numbers of chunks where it may end; None: any.
        """
        size = self._layout.chunk_tokens
        start = computed // size
        if limit is not None:
            tiers = tiers[: (computed + limit) // size - start]
        ends = (
            None if places is None else {p - start for p in places if 0 < p - start <= len(tiers)}
        )
        count = self.worth(tiers, ends)
        most = len(tiers) if ends is None else max(ends, default=0)
        if count < most and self.speeds.probing.isdisjoint(tiers):
            self.speeds.refused(tiers[count])
        for tier in set(tiers) if count == len(tiers) else ():
            self.speeds.worthwhile(tier)
        return start + count


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)


def chunks_to_load(
    tiers: Sequence[int],
    chunk_tokens: int,
    chunk_bytes: int,
    speeds: Speeds,
    beside: int = 0,
    ends: Collection[int] | None = None,
) -> int:
    """How many leading chunks to load, ``tiers[i]`` being the tier of chunk i; ``beside`` more
    bytes (states) come with any number of them. One of ``ends``, or 0, if they are given.

    Of all prefixes of the hit, the one that saves most time; a speed not yet measured counts as
    fast, so that it gets measured. Chunks that stand in a slow tier behind fast ones are left to
    the engine; fast ones behind slow ones are worth the slow ones if the sum is.
    """
    most = len(tiers) if ends is None else max(ends, default=0)
    if speeds.prefill_tokens_per_s is None:
        return most
    compute_s = chunk_tokens / speeds.prefill_tokens_per_s
    slowest = min((s for t, s in speeds.tier_bytes_per_s.items() if t in tiers), default=None)
    saved_s = -beside / slowest if slowest else 0.0
    best_s, best, probed = 0.0, 0, 0
    for index, tier in enumerate(tiers[:most]):
        probed += tier in speeds.probing
        if probed > PROBE_CHUNKS and (ends is None or best):
            break
        speed = speeds.tier_bytes_per_s.get(tier)
        saved_s += compute_s - (chunk_bytes / speed if speed else 0.0)
        if saved_s > best_s and (ends is None or index + 1 in ends):
            best, best_s = index + 1, saved_s
    return best
