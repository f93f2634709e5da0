"""One request, as the scheduler half of the connector knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from connector import compat
from connector.blend_claims import Claim
from connector.blend_options import BlendOptions
from connector.lookup import Lookup
from connector.messages import SaveJob
from connector.options import RequestOptions
from prefixstore.identity import ModelIdentity
from prefixstore.keys import KeyChain


@dataclass
class Tracked:
    """What is known of a request. ``blocks_per_chunk``: of the engine's."""

    request: Any
    options: RequestOptions
    identity: ModelIdentity
    chain: KeyChain
    blocks_per_chunk: int
    blocks: list[int] = field(default_factory=list)
    next_save: int = 0
    lookup: Lookup = field(default_factory=Lookup)
    promised: tuple[int, int] = (0, 0)  # chunks [start, stop) vLLM was told will be loaded
    loading: bool = False
    blend: BlendOptions | None = None
    claim: Claim | None = None  # set when what was promised includes segments
    isolated_from: int | None = None  # from here its blocks have names of their own
    blended: bool = False  # its KV is from now on its own: never saved
    may_load: bool = True
    outcome: str = ""  # why nothing will be loaded, to be counted when the request is admitted
    error: str = ""

    def extend(self) -> None:
        """Give the chain the tokens that are known by now."""
        known = self.chain.num_tokens
        if self.request.num_tokens > known:
            self.chain.extend(compat.token_ids(self.request, known))

    def blocks_of(self, start: int, stop: int) -> list[list[int]]:
        """The blocks of chunks ``[start, stop)``."""
        step = self.blocks_per_chunk
        return [self.blocks[i * step : (i + 1) * step] for i in range(start, stop)]

    def isolate(self, exact: int, isolate: Callable[[Any, int], None]) -> bool:
        """It will be blended behind ``exact`` tokens: name its blocks there apart from others'.

        vLLM's prefix cache then gives nobody what is blended, and gives it nothing of others' that
        would make its answer depend on who asked before. Whether this was the first time.
        """
        known = self.isolated_from
        if known is None or exact < known:
            isolate(self.request, exact)
            self.isolated_from = exact
        return known is None

    def save_job(self, computed_tokens: int) -> SaveJob | None:
        """The chunks that are complete after this step and whose token ids are known."""
        start = self.next_save
        stop = min(computed_tokens, self.request.num_tokens) // self.chain.chunk_tokens
        if stop <= start or self.blended:
            return None
        self.extend()
        self.next_save = stop
        options = self.options
        return SaveJob(
            self.request.request_id,
            self.identity.namespace,
            self.chain.refs(start, stop),
            self.blocks_of(start, stop),
            options.ttl_s,
            options.tag,
            options.pin,
            options.alone,
        )
