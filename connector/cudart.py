"""Functions of CUDA's runtime that torch does not offer, of the library it has loaded."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache

import torch

logger = logging.getLogger("vllm.prefixstore")

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


@cache
def _exchange() -> Callable[..., int] | None:
    """None where there is no such thing, which is said."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
        found = library.cudaThreadExchangeStreamCaptureMode
    except (OSError, AttributeError) as error:
        logger.warning("prefixstore: graphs may fail to be captured: %s", error)
        return None
    found.argtypes, found.restype = [ctypes.POINTER(ctypes.c_int)], ctypes.c_int
    return lambda mode: int(found(mode))


def apart_from_captures() -> bool:
    """What this thread asks of CUDA from now on does not end a graph's capture by another one, as
    registering memory would; whether that can be said. The thread must not capture any itself."""
    exchange = _exchange()
    return exchange is not None and exchange(ctypes.byref(ctypes.c_int(_RELAXED))) == 0
