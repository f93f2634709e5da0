"""Deadlines of coroutines. `asyncio.timeout` came with Python 3.11; before, aiohttp brings one.

Why not `asyncio.wait_for`: it makes a task for each wait, before Python 3.12 it may swallow a
cancellation, and what its task raises after one is a traceback in the log.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout as timeout
    from asyncio import timeout_at as timeout_at
else:
    from async_timeout import timeout as timeout
    from async_timeout import timeout_at as timeout_at
