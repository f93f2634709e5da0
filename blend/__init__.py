"""blend: reuse of KV that is not a prefix, and rounding. Needs torch; knows no engine, opens no
store.

K is stored as the engine computed it, rotated for the position it had. :class:`Rope` moves it to
the position where it is used next.
"""

from __future__ import annotations

from blend.errors import BlendError, UnsupportedModelError
from blend.rope import Rope

__all__ = ["BlendError", "Rope", "UnsupportedModelError"]
