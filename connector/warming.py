"""Warming, vLLM's part: its offline engine with the connector, so that what is stored is what
serving would store.

Owns the engine. The engine core runs in the caller's process: what ends the caller in any way ends
the engine too, and both have one grip on the store.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from connector import blend_compat, compat
from connector.geometry import geometry_of
from connector.options import REQUEST_KEY, full_salt
from prefixstore import warm_plan
from prefixstore.codec import NONE
from prefixstore.codec.rounded import rounded_layout
from prefixstore.errors import ConfigError, StoreError
from prefixstore.layout import Layout

# Without any request ending, the engine goes round in circles. This is seen between two steps: a
# step that does not return, on a device that hangs, say, is waited for without end.
STALL_S = 1800.0
SETTLE_S = 10.0
STORE_MS = 2000  # a store may take so long for a request: nobody is waiting for its answer
_OURS = ("model", "kv_transfer_config")
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# How vLLM refuses a model, an argument, or a device without room.
_REFUSALS = (
    TypeError, ValueError, OSError, RuntimeError, ImportError, AssertionError, AttributeError,
    LookupError,
)  # fmt: skip


def facts(
    model: str, engine: Mapping[str, Any], chunk_tokens: int, codec: str = NONE
) -> warm_plan.Engine:
    """What an engine with these arguments will be, as far as vLLM says without starting it.

    Raises ConfigError when vLLM refuses the arguments, or the store cannot keep its KV.
    """
    _check(engine)
    try:
        from vllm import EngineArgs

        config = EngineArgs(model=model, **engine).create_engine_config()
    except _REFUSALS as error:
        raise _refused("vLLM refuses this model or its arguments", error) from error
    block = config.cache_config.block_size or 1
    tokens = -(-chunk_tokens // block) * block
    identity = compat.identities(config, tokens)(None).with_codec(codec)
    layout = Layout(
        identity.num_layers, 2, identity.num_kv_heads, tokens,
        identity.head_size * _ELEMENT_BYTES.get(identity.kv_dtype, 1),
    )  # fmt: skip
    layout = rounded_layout(codec, layout, identity.kv_dtype)
    # Of the groups of layers nothing is known yet: a model with several is refused at the start.
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=None)])
    return warm_plan.Engine(
        model, identity, layout, _prompt_tokens(config), _text_config(config),
        blend_compat.refusal(config, groups),
    )  # fmt: skip


class WarmingEngine:
    """A running engine. A context manager.

    ``store`` is what its connector is told of the store (`options.EngineOptions`): ``dir``, a
    folder that must be there, or ``url`` and what goes with it. Raises ConfigError as `facts` does.
    """

    def __init__(
        self, model: str, store: Mapping[str, Any], engine: Mapping[str, Any], chunk_tokens: int
    ) -> None:
        _check(engine)
        extra = {"stall_ms": STORE_MS, **store, "chunk_tokens": chunk_tokens}
        transfer = {
            "kv_connector": "PrefixStoreConnector",
            "kv_connector_module_path": "connector.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        began = time.monotonic()
        self._serial = 0
        before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM
            from vllm.config import KVTransferConfig

            self._llm = LLM(model=model, kv_transfer_config=KVTransferConfig(**transfer), **engine)
        except _REFUSALS as error:
            raise _refused("vLLM did not start", error) from error
        finally:
            if before is None:
                del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
            else:
                os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before
        self.start_s = time.monotonic() - began
        with ExitStack() as unless_all_is_well:
            unless_all_is_well.callback(self.close)
            self.facts = self._facts(model, chunk_tokens, str(store.get("codec", NONE)))
            unless_all_is_well.pop_all()

    def _facts(self, model: str, chunk_tokens: int, codec: str) -> warm_plan.Engine:
        config = self._llm.llm_engine.vllm_config
        caches = self._scheduler.kv_cache_config
        geometry = geometry_of(config, caches, chunk_tokens, codec)
        if geometry.layout is None:
            raise ConfigError(
                f"the store cannot keep this engine's KV: {geometry.refused}",
                "serve this model without it",
            )
        identify = compat.identities(config, geometry.layout.chunk_tokens)
        return warm_plan.Engine(
            model, identify(None).with_codec(codec), geometry.layout,
            _prompt_tokens(config), _text_config(config), blend_compat.refusal(config, caches),
        )  # fmt: skip

    @property
    def _scheduler(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler

    def salt(self, text: str) -> bytes:
        """The salt of the keys of a request whose option ``salt`` is ``text``."""
        return full_salt(None, text)

    def compute(self, prompts: Sequence[tuple[list[int], dict[str, Any]]]) -> Iterator[int]:
        """Compute prompts: (token ids, options of the request). Yields the index of each, as it
        ends; its chunks are in the store soon after. Raises StoreError."""
        running: dict[str, int] = {}
        try:
            for index, (ids, options) in enumerate(prompts):
                running[self._add(ids, options)] = index
            last = time.monotonic()
            while running:
                if time.monotonic() - last > STALL_S:
                    raise StoreError(f"no prompt ended within {STALL_S:.0f} s", "see vLLM's log")
                for output in self._step():
                    if not output.finished:
                        continue
                    last = time.monotonic()
                    _check_answer(output.kv_transfer_params)
                    yield running.pop(output.request_id)
        finally:
            if running:
                self._llm.llm_engine.abort_request(list(running))
        end = time.monotonic() + SETTLE_S
        while self._scheduler.has_requests() and time.monotonic() < end:
            self._step()

    def _add(self, ids: list[int], options: dict[str, Any]) -> str:
        from vllm import SamplingParams, TokensPrompt

        self._serial += 1
        name = f"warm-{self._serial}"
        extra = {"kv_transfer_params": {REQUEST_KEY: options}}
        sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra)
        try:
            self._llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=ids), sampling)
        except ValueError as error:
            raise StoreError(f"vLLM refuses a prompt of {len(ids)} tokens: {error}") from error
        return name

    def _step(self) -> list[Any]:
        try:
            return list(self._llm.llm_engine.step())
        except RuntimeError as error:
            raise StoreError(
                f"vLLM failed: {error}", "what is stored stays; run again to go on"
            ) from error

    def close(self) -> None:
        """End the engine; what is staged is stored first."""
        self._llm.llm_engine.engine_core.shutdown()

    def __enter__(self) -> WarmingEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(engine: Mapping[str, Any]) -> None:
    wrong = [name for name in _OURS if name in engine]
    if wrong:
        raise ConfigError(f"the engine's arguments have {wrong}", "warming sets them itself")


def _refused(what: str, error: BaseException) -> ConfigError:
    reason = str(error) or type(error).__name__
    return ConfigError(f"{what}: {reason}", "give the arguments that you serve it with")


def _check_answer(params: Any) -> None:
    error = ((params or {}).get(REQUEST_KEY) or {}).get("error")
    if error:
        raise ConfigError(str(error))


def _prompt_tokens(config: Any) -> int:
    return int(config.model_config.max_model_len) - 1


def _text_config(config: Any) -> dict[str, Any]:
    return dict(config.model_config.hf_text_config.to_dict())
