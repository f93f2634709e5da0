"""The scheduler's part of the self-test: blended KV is given to nobody and saved nowhere.

A request that will be blended must have other names in vLLM's prefix cache than any other request
from its first block that is not exact on, blocks that its answer completes included, and those
before must keep theirs. Tried on requests of vLLM's own class, while the engine starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from blend.errors import BlendError
from connector.groups import KvGroup
from connector.options import RequestOptions
from connector.self_test import checking
from connector.tracked import Tracked
from prefixstore.keys import KeyChain

Isolate = Callable[[Any, int], None]
Make = Callable[[str, int], Any]


def check_isolation(isolate: Isolate, vllm_config: Any, kv_cache_config: Any) -> None:
    """With requests of vLLM's own class and its names of blocks. Raises SelfTestError."""
    with checking("what keeps blended KV apart"):
        size, make = _request_maker(vllm_config, kv_cache_config)
        for prompt, exact in ((5.5, 2.5), (3.0, 0.0), (3.0, 3.0), (0.5, 0.0)):
            tokens = int(exact * size)
            requests = [make(name, int(prompt * size)) for name in ("plain", "one", "other")]
            for request in requests[1:]:
                isolate(request, tokens)
            with _root_name():
                names = [_names_later(request, int(1.5 * size)) for request in requests]
            same = [len(set(block)) for block in zip(*names, strict=True)]
            first = min(int(exact), max(int(prompt) - 1, 0))
            shared = sum(count < 3 for count in same[first:])
            if len(same) != int(prompt + 1.5) or shared:
                raise BlendError(
                    f"of a prompt of {prompt:g} blocks, {exact:g} of them exact, {shared} later "
                    f"blocks of {len(same)} have a name that other requests know"
                )
            if same[:first].count(1) < first:
                raise BlendError(f"of {first} exact blocks {same[:first].count(1)} keep their name")
            _check_not_saved(requests[1], size)


def _check_not_saved(request: Any, size: int) -> None:
    for blended in (False, True):
        chain, blocks = KeyChain(bytes(16), size), list(range(request.num_tokens // size))
        identity: Any = SimpleNamespace(namespace=chain.namespace)
        groups = (KvGroup(size),)
        tracked = Tracked(
            request, RequestOptions(), identity, chain, groups, tables=[blocks], blended=blended
        )
        job = tracked.save_job(request.num_tokens)
        if (job is None) != blended:
            kind, saved = ("blended", "would") if blended else ("plain", "would not")
            raise BlendError(f"a {kind} request {saved} be saved")


def _request_maker(vllm_config: Any, kv_cache_config: Any) -> tuple[int, Make]:
    """Tokens of a named block, and what makes requests of so many tokens, all of them the same."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    size = getattr(kv_cache_config, "hash_block_size", None)
    size = int(size or kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    hasher = get_request_block_hasher(size, get_hash_fn_by_name(algorithm))
    known = inspect.signature(Request).parameters

    def make(name: str, tokens: int) -> Any:
        given = {
            "request_id": f"self-test {name}", "prompt_token_ids": [1] * tokens,
            "sampling_params": SamplingParams(max_tokens=1), "pooling_params": None,
            "eos_token_id": None, "block_hasher": hasher,
        }  # fmt: skip
        with _root_name():
            return Request(**{key: value for key, value in given.items() if key in known})

    return size, make


def _names_later(request: Any, tokens: int) -> list[bytes]:
    """Names of all its blocks once it has an answer of so many tokens."""
    request.append_output_token_ids([1] * tokens)
    return [bytes(name) for name in request.block_hashes]


@contextmanager
def _root_name() -> Iterator[None]:
    """What the first block's name follows from. vLLM draws its own later than this runs."""
    from vllm.v1.core import kv_cache_utils

    absent = not hasattr(kv_cache_utils, "NONE_HASH")
    if absent:
        kv_cache_utils.NONE_HASH = kv_cache_utils.BlockHash(bytes(32))
    try:
        yield
    finally:
        if absent:
            del kv_cache_utils.NONE_HASH
