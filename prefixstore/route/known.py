"""Which blocks a worker's own cache holds, as far as one can tell. Bounded; lost with the process.

Two sources. What was *sent* to the worker: it is there once it was computed, until the worker
evicts it; kept in the order and number in which vLLM keeps blocks. What the worker *tells* (its KV
events): if it has told of everything since its start, that is exact, and what was sent counts only
for the moment until it is told of.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefixstore.keys import token_bytes
from prefixstore.route import limits
from prefixstore.route.prompt import ROOT, next_key

if TYPE_CHECKING:
    from prefixstore.serve.kv_wire import BlockRemoved, BlockStored

Hash = bytes | int
_GPU = ("GPU", None)


class Known:
    """See the module docstring. ``tells``: whether the worker has told of everything."""

    def __init__(self) -> None:
        self.block_tokens = limits.BLOCK_TOKENS
        self.blocks_max = limits.BLOCKS_MAX
        self.tells = False
        self.restarts = 0  # of the worker, as far as was noticed
        self._sent: OrderedDict[bytes, float] = OrderedDict()
        self._told: OrderedDict[Hash, bytes] = OrderedDict()  # the worker's hash -> our key
        self._times: Counter[bytes] = Counter()  # how many of its blocks have a key

    def __len__(self) -> int:
        return len(self._times) if self.tells else len(self._sent)

    def shape(self, block_tokens: int, blocks: int) -> None:
        """What the worker says of its cache: the size of a block, and how many there are."""
        if block_tokens != self.block_tokens:
            self.restart()
        self.block_tokens = block_tokens
        self.blocks_max = min(blocks, limits.BLOCKS_MAX)

    def restart(self) -> None:
        """The worker is another process now: what it tells begins anew."""
        self.forget()
        self.tells = False
        self.restarts += 1

    def forget(self) -> None:
        """It has nothing."""
        self._sent.clear()
        self._told.clear()
        self._times.clear()

    def matches(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks are there."""
        since = time.monotonic() - limits.EXPECT_S if self.tells else 0.0
        for count, key in enumerate(keys):
            if key not in self._times and self._sent.get(key, -1.0) < since:
                return count
        return len(keys)

    def send(self, keys: Sequence[bytes]) -> None:
        """A prompt with these blocks goes there."""
        now, sent = time.monotonic(), self._sent
        for key in reversed(keys):  # vLLM, too, evicts the end of a prompt before its beginning
            sent[key] = now
            sent.move_to_end(key)
        while len(sent) > self.blocks_max:
            sent.popitem(last=False)

    # ------------------------------------------------------------------ events
    def removed(self, event: BlockRemoved) -> None:
        """The worker has dropped blocks."""
        if event.medium in _GPU and not event.group_idx:
            for one in event.block_hashes:
                self._remove(one)

    def stored(self, event: BlockStored) -> None:
        """The worker has blocks. Of several groups of layers the first speaks for all. Raises
        ConfigError for token ids that are none."""
        if event.medium not in _GPU or event.group_idx or event.block_size != self.block_tokens:
            return
        parent = event.parent_block_hash
        if parent is not None and parent not in self._told:
            return  # what stands before it was not told of, so it is in no prompt we could name
        key = ROOT if parent is None else self._told[parent]
        extras, size = event.extra_keys, event.block_size
        for number, one in enumerate(event.block_hashes):
            tokens = token_bytes(event.token_ids[number * size : (number + 1) * size])
            extra: Sequence[Any] | None = [event.lora_name] if event.lora_name else None
            if extras is not None and number < len(extras):
                extra = extras[number]
            key = next_key(key, tokens, extra)
            self._remove(one)
            self._told[one] = key
            self._times[key] += 1
        while len(self._told) > self.blocks_max:  # removals were lost
            self._remove(next(iter(self._told)))

    def _remove(self, one: Hash) -> None:
        key = self._told.pop(one, None)
        if key is not None:
            self._times[key] -= 1
            if not self._times[key]:
                del self._times[key]
            self._sent.pop(key, None)
