"""Codecs: how chunks are made smaller for tiers that are slow, such as a pool over the network.

`lossless` gives back every byte. `fp8` and `int8` round KV to 8 bits (`lossy`), so what they give
is another model's KV, so to say: it is part of the identity (`identity.with_codec`), and a look-up
for exact KV never finds it. `registry` has them by name; `pool.coded` says what is stored.

This module imports nothing heavy: the command line names them.
"""

from __future__ import annotations

from prefixstore.errors import ConfigError

NONE, AUTO, LOSSLESS, FP8, INT8 = "none", "auto", "lossless", "fp8", "int8"
LOSSY_NAMES = (FP8, INT8)
# What an operator may choose. ``auto``: lossless, where it was measured to make gets faster.
CHOICES = (NONE, AUTO, LOSSLESS, *LOSSY_NAMES)


def check_choice(codec: object) -> str:
    """The codec that was asked for. Raises ConfigError for one that is none."""
    if codec not in CHOICES:
        raise ConfigError(f"codec={codec!r:.80}", f"give one of {', '.join(CHOICES)}")
    return str(codec)
