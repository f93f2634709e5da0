"""Functions of CUDA's runtime that torch does not offer, of the library it has loaded."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

logger = logging.getLogger("vllm.prefixstore")

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


def function(name: str, arguments: Sequence[Any], without: str) -> Callable[..., int] | None:
    """One that returns a cudaError_t; None where there is no such thing, which is said with what
    is done ``without``."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        found = getattr(library, name)
    except (OSError, AttributeError) as error:
        logger.warning("prefixstore: %s: %s", without, error)
        return None
    found.argtypes, found.restype = list(arguments), ctypes.c_int
    return lambda *given: int(found(*given))


@cache
def _exchange() -> Callable[..., int] | None:
    pointer = [ctypes.POINTER(ctypes.c_int)]
    return function(
        "cudaThreadExchangeStreamCaptureMode", pointer, "graphs may fail to be captured"
    )


def apart_from_captures() -> bool:
    """What this thread asks of CUDA from now on does not end a graph's capture by another one, as
    registering memory would; whether that can be said. The thread must not capture any itself."""
    exchange = _exchange()
    return exchange is not None and exchange(ctypes.byref(ctypes.c_int(_RELAXED))) == 0
