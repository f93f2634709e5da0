"""Small tables to the device."""

from __future__ import annotations

import torch


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on that device; on CUDA only enqueued, on the current stream: from pageable memory
    the copy would wait for it."""
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)
