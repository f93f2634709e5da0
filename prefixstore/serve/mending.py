"""A store that is lost while it is served is opened again.

Until then requests are refused with 503, which clients come back from. What must hold: a store is
closed when no request is in it any more, or DRAIN_S after it was seen to be lost, whatever hangs in
it; nothing here waits on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from prefixstore.reopening import Reopener
from prefixstore.serve.auth import LOCAL
from prefixstore.serve.eyes import Eyes
from prefixstore.serve.state import State
from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
LOOK_S = 1.0
DRAIN_S = 10.0  # for all requests that were in it when it was lost; later ones are refused
POLL_S = 0.02


class Mender:
    """See the module docstring. Used on the event loop's thread."""

    def __init__(self, state: State, eyes: Eyes, open_it: Callable[[], Store]) -> None:
        self._state, self._eyes = state, eyes
        self._reopener = Reopener(open_it, str(state.store.folder), logger.warning)

    async def run(self) -> None:
        """Look once in a while, until it is cancelled."""
        lost: Store | None = None
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._state.store.gone:
                continue
            if lost is not self._state.store:
                lost = self._state.store
                logger.warning(
                    "the store %s %s: it is opened again, until then requests are refused",
                    lost.folder, lost.lost,
                )  # fmt: skip
                await self._drain()
                found = await self._again(lost)
            else:
                found = await self._again(None)  # it is closed already
            if found is not None:
                self._state.renew(found)
                self._eyes.follow(found)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + DRAIN_S
        while self._state.busy and loop.time() < end:
            await asyncio.sleep(POLL_S)

    async def _again(self, lost: Store | None) -> Store | None:
        job = self._state.mending.submit(LOCAL, lambda: self._reopener.again(lost))
        try:
            return await asyncio.shield(job.future)
        except asyncio.CancelledError:
            job.give_up(_close)
            raise


def _close(found: Store | None) -> None:
    if found is not None:
        found.close()
