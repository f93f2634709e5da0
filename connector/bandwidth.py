"""How fast each tier gave what was loaded from it."""

from __future__ import annotations

from prefixstore.config import MIB

MEASURED_BYTES_MIN = MIB  # a smaller load measures overhead


class Bandwidth:
    """Bytes a second, by tier."""

    def __init__(self) -> None:
        self._measured: dict[int, float] = {}
        self._warm: set[int] = set()

    def saw(self, tier: int, num_bytes: float, seconds: float) -> None:
        """A load ended. A tier's first one pays for page faults and allocations: left out."""
        if num_bytes >= MEASURED_BYTES_MIN and tier in self._warm:
            self._measured[tier] = num_bytes / max(seconds, 1e-6)
        self._warm.add(tier)

    def saw_slow(self, tier: int, bytes_per_s: float) -> None:
        """A load was ended because the tier is slow: that counts, however little was loaded."""
        self._measured[tier] = bytes_per_s
        self._warm.add(tier)

    def take(self) -> dict[int, float]:
        """What was measured last, since the last call."""
        taken, self._measured = self._measured, {}
        return taken
