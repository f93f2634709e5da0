"""How long the GPU takes for what a call enqueues, and how long the host takes to enqueue it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

REPEATS, WARM = 20, 3


@dataclass
class Timed:
    """Samples in ms: between two events on the current stream around the call, and until the call
    returned. Where the second is as long as the first the GPU waits for the host."""

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


def timed(work: Callable[[], object], repeats: int = REPEATS) -> Timed:
    """Calls after some that warm it; each begins when the GPU has nothing to do."""
    found = Timed()
    for number in range(WARM + repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        began = time.perf_counter()
        work()
        returned = time.perf_counter()
        end.record()
        end.synchronize()
        if number >= WARM:
            found.ms.append(begin.elapsed_time(end))
            found.host_ms.append(1e3 * (returned - began))
    return found
