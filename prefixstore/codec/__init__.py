"""Codecs: how chunks are made smaller.

`lossless` gives back every byte; a pool over the network uses it (`pool.coded` says what is
stored). `fp8` and `int8` round KV to 8 bits (`rounded`); engines do that, with any store. What
comes back is another model's KV, so to say: the codec is part of the identity
(`identity.with_codec`), and a look-up for exact KV never finds it.

This module imports nothing heavy: the command line names them.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefixstore.errors import ConfigError

NONE, AUTO, LOSSLESS, FP8, INT8 = "none", "auto", "lossless", "fp8", "int8"
LOSSY_NAMES = (FP8, INT8)
# ``auto``: lossless, where it was measured to make gets faster.
POOL_CHOICES = (NONE, AUTO, LOSSLESS)
CHOICES = (*POOL_CHOICES, *LOSSY_NAMES)  # of an engine, and who warms for one


def check_choice(codec: object, choices: Sequence[str] = CHOICES) -> str:
    """The codec that was asked for. Raises ConfigError for one that is none of them."""
    if codec not in choices:
        of = " (engines round: give it to them)" if codec in LOSSY_NAMES else ""
        raise ConfigError(f"codec={codec!r:.80}{of}", f"give one of {', '.join(choices)}")
    return str(codec)


def check_engine_choice(codec: object, *, has_pool: bool) -> str:
    """The same of an engine, which has a pool or not."""
    name = check_choice(codec)
    if of_pool(name) != NONE and not has_pool:
        rounds = " or ".join(LOSSY_NAMES)
        raise ConfigError(f"codec={name} without a pool", f"give a pool's url, or {rounds}")
    return name


def of_pool(codec: str) -> str:
    """What is left to a pool of an engine's choice: what is rounded has no other codec."""
    return codec if codec in POOL_CHOICES else NONE
