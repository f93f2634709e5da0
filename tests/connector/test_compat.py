"""What is read from vLLM's objects: sizes, refusals, requests. The objects are stand-ins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from connector import compat, ranks
from connector.geometry import geometry_of
from connector.groups import KvGroup
from connector.options import EngineOptions
from prefixstore import Layout
from prefixstore.errors import ConfigError


class FullAttentionSpec(SimpleNamespace):
    """vLLM's class is known by its name."""


class SlidingWindowSpec(SimpleNamespace):
    pass


class MLAAttentionSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


def group(kind: type[Any] = FullAttentionSpec, layers: Sequence[int] = (0,), **spec: Any) -> Any:
    """A stand-in for one of vLLM's groups."""
    values = {"block_size": 16, "head_size": 64, "num_kv_heads": 8, "dtype": torch.bfloat16}
    names = [f"model.layers.{i}.self_attn.attn" for i in layers]
    return SimpleNamespace(kv_cache_spec=kind(**{**values, **spec}), layer_names=names)


def engine(
    *, kv_heads: int = 8, tensor_parallel: int = 1, block: int = 16,
    groups: Sequence[Any] | None = None, dtype: torch.dtype = torch.bfloat16, **cache: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """A stand-in for (vllm_config, kv_cache_config)."""
    per_rank = max(1, kv_heads // tensor_parallel)
    if groups is None:
        groups = [group(block_size=block, num_kv_heads=per_rank, dtype=dtype)]
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(num_hidden_layers=12),
        get_total_num_kv_heads=lambda: kv_heads,
    )
    parallel = SimpleNamespace(tensor_parallel_size=tensor_parallel)
    config = SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        scheduler_config=SimpleNamespace(),
        cache_config=SimpleNamespace(block_size=block, **cache),
    )
    return config, SimpleNamespace(kv_cache_groups=list(groups))


@pytest.mark.parametrize(
    ("block", "wanted", "chunk"), [(16, 64, 64), (128, 64, 128), (48, 64, 96), (64, 1, 64)]
)
def test_a_chunk_is_whole_blocks(block: int, wanted: int, chunk: int) -> None:
    found = geometry_of(*engine(block=block), wanted)
    assert found.block_tokens == block
    assert found.layout == Layout(12, 2, 8, chunk, 128)
    assert found.refused == ""


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8, 16])
def test_the_layout_is_the_whole_models_whatever_the_ranks(tensor_parallel: int) -> None:
    found = geometry_of(*engine(tensor_parallel=tensor_parallel), 64)
    assert found.layout == Layout(12, 2, 8, 64, 128)


def test_bytes_follow_the_dtype() -> None:
    sizes = {torch.float32: 256, torch.bfloat16: 128, torch.uint8: 64}
    for dtype, head_bytes in sizes.items():
        layout = geometry_of(*engine(dtype=dtype), 64).layout
        assert layout is not None
        assert layout.head_bytes == head_bytes


def test_chunks_are_smaller_where_kv_is_rounded() -> None:
    plain = geometry_of(*engine(dtype=torch.bfloat16), 64)
    found = geometry_of(*engine(dtype=torch.bfloat16), 64, "fp8")
    assert found == replace(plain, layout=Layout(12, 2, 8, 64, 68))
    with pytest.raises(ConfigError, match="KV cache of uint8"):
        geometry_of(*engine(dtype=torch.uint8), 64, "fp8")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"groups": [group(), group(MambaSpec)]}, "prefix caching"),
        ({"groups": [group(SlidingWindowSpec, sliding_window=63)]}, "window of 63 tokens"),
        ({"groups": [group(), group(head_size=128)]}, "different KV"),
        ({"groups": [group(), group(dtype=torch.float32)]}, "different KV"),
        ({"groups": [group(non_causal=True)]}, "not causal"),
        ({"groups": []}, "no KV cache"),
        ({"calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    found = geometry_of(*engine(**changes), 64)
    assert found.layout is None
    assert named in found.refused


def test_groups_and_their_windows() -> None:
    kinds = [group(block_size=32), group(SlidingWindowSpec, [1], sliding_window=96, block_size=48)]
    found = geometry_of(*engine(groups=kinds), 64)
    assert found.refused == ""
    assert found.layout == Layout(12, 2, 8, 96, 128)
    assert found.groups == (KvGroup(32, 0), KvGroup(48, 1, 96))


def test_a_draft_models_layers_do_not_count() -> None:
    named = group(layers=[0], head_size=32)
    named.layer_names = ["draft_model.model.layers.0.self_attn.attn"]
    kinds = [group(layers=[12], head_size=32), named, group(layers=[0, 12])]
    config, kv_config = engine(groups=kinds)
    assert "different KV" in geometry_of(config, kv_config, 64).refused
    config.speculative_config = SimpleNamespace()
    found = geometry_of(config, kv_config, 64)
    assert found.groups == (KvGroup(16, 2),)
    assert found.layout == Layout(12, 2, 8, 64, 128)


@pytest.mark.parametrize("drafts", [None, SimpleNamespace()])
def test_states_are_never_taken_for_a_drafts(drafts: Any) -> None:
    """Falcon-H1 numbers its Mamba layers behind those of attention."""
    config, kv_config = engine(groups=[group(layers=[0]), group(MambaSpec, layers=[12])])
    config.speculative_config = drafts
    found = geometry_of(config, kv_config, 64)
    assert found.layout is None
    assert "prefix caching" in found.refused


def test_a_latent_is_one_plane_of_one_head() -> None:
    kinds = [group(MLAAttentionSpec, head_size=576, num_kv_heads=1)]
    assert geometry_of(*engine(groups=kinds), 64).layout == Layout(12, 1, 1, 64, 1152)


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallel_is_refused(name: str) -> None:
    config, kv_config = engine()
    setattr(config.parallel_config, name, 2)
    assert name in geometry_of(config, kv_config, 64).refused


def test_heads_that_do_not_add_up_are_refused() -> None:
    config, kv_config = engine()
    kv_config.kv_cache_groups[0].kv_cache_spec.num_kv_heads = 3
    assert "3 KV heads" in geometry_of(config, kv_config, 64).refused


def test_prompts_that_are_no_tokens() -> None:
    def request(ids: Any, embeds: Any, **more: Any) -> Any:
        return SimpleNamespace(prompt_token_ids=ids, prompt_embeds=embeds, mm_features=None, **more)

    assert compat.has_stable_tokens(request([1], None))
    assert compat.has_stable_tokens(request([1], None, resumable=False))
    assert not compat.has_stable_tokens(request(None, None))
    assert not compat.has_stable_tokens(request([1], torch.zeros(1)))
    assert not compat.has_stable_tokens(request([1], None, resumable=True))


HASH = hashlib.blake2b(b"an image", digest_size=32).hexdigest()


@pytest.mark.parametrize(
    ("identifiers", "stable"),
    [
        ([], True), ([HASH], True), ([2 * HASH], True), (["adapter:" + HASH], True),
        (["0"], False), (["image-0"], False), ([""], False), ([HASH[:-1]], False),
        (["x" + HASH], False), ([HASH + "-0"], False), ([HASH.upper()], False),
        ([HASH, "0"], False), (["0", HASH], False),
    ],
)  # fmt: skip
def test_only_content_hashes_name_an_image(identifiers: list[str], stable: bool) -> None:
    """A counter or a client's name may stand for another image tomorrow."""
    features = [feature("image", name, 4 * i, 4) for i, name in enumerate(identifiers)]
    request = SimpleNamespace(prompt_token_ids=[1], prompt_embeds=None, mm_features=features)
    assert compat.has_stable_tokens(request) is stable


@pytest.mark.parametrize("load", ["auto", "both", "always", "never"])
@pytest.mark.parametrize("save", [True, False])
def test_the_role_can_only_take_away(load: str, save: bool) -> None:
    options = EngineOptions(dir="/cache", load=load, save=save)

    def heeded(consumer: bool, producer: bool) -> EngineOptions:
        transfer = SimpleNamespace(is_kv_consumer=consumer, is_kv_producer=producer)
        return compat.heed_role(options, transfer)

    assert heeded(True, True) == options
    assert heeded(True, False) == replace(options, save=False)
    assert heeded(False, True) == replace(options, load="never")
    assert heeded(False, False) == replace(options, load="never", save=False)


def engine_settings(*, rope: str = "default", max_model_len: int = 1, **more: Any) -> Any:
    text = SimpleNamespace(to_dict=lambda: {"rope_parameters": {"rope_type": rope}})
    model = SimpleNamespace(hf_text_config=text, max_model_len=max_model_len, **more)
    return compat._settings_that_change_kv(model)


def test_settings_that_change_kv() -> None:
    plain = engine_settings()
    assert plain == {}
    assert engine_settings(model_impl="auto") == engine_settings(model_impl="ModelImpl.VLLM") == {}
    found = [
        engine_settings(model_impl="ModelImpl.TRANSFORMERS"),
        engine_settings(quantization_config={"a": 1}),
        engine_settings(model_class_overrides={"A": "B"}),
        engine_settings(mm_processor_kwargs={"size": 1}),
        engine_settings(mm_processor_kwargs={"size": 2}),
        engine_settings(rope="longrope", max_model_len=1),
        engine_settings(rope="dynamic", max_model_len=2),
    ]
    assert plain not in found
    assert len({str(settings) for settings in found}) == len(found)
    assert engine_settings(max_model_len=2) == plain  # matters to such ropes alone


def test_token_ids_from_a_place_on() -> None:
    request = SimpleNamespace(all_token_ids=(5, 6, 7, 8))
    assert compat.token_ids(request, 0) == [5, 6, 7, 8]
    assert compat.token_ids(request, 3) == [8]
    assert compat.token_ids(request, 4) == []


def feature(modality: str, identifier: str, offset: int, length: int) -> Any:
    position = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(modality=modality, identifier=identifier, mm_position=position)


def test_multimodal_items_are_told_apart() -> None:
    items = compat.multimodal_items(
        SimpleNamespace(
            mm_features=[
                feature("image", "abc", 3, 10), feature("image", "abd", 20, 10),
                feature("audio", "abc", 40, 5), feature("image", "abc", 50, 10),
            ]
        )
    )  # fmt: skip
    assert [(item.offset, item.num_tokens) for item in items] == [
        (3, 10),
        (20, 10),
        (40, 5),
        (50, 10),
    ]
    hashes = [item.digest for item in items]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3
    assert compat.multimodal_items(SimpleNamespace(mm_features=None)) == []


def test_the_steps_requests() -> None:
    new = SimpleNamespace(req_id="a", block_ids=([1, 2], [9]), num_computed_tokens=8)
    cached = SimpleNamespace(
        req_ids=["b", "c", "d"],
        new_block_ids=[None, ([5], []), ([6, 7], [0])],
        num_computed_tokens=[3, 4, 0],
        resumed_req_ids={"d"},
    )
    output = SimpleNamespace(scheduled_new_reqs=[new], scheduled_cached_reqs=cached)
    assert list(compat.scheduled_requests(output)) == [
        ("a", [[1, 2], [9]], 8, True),
        ("b", None, 3, False),
        ("c", [[5], []], 4, False),
        ("d", [[6, 7], [0]], 0, True),
    ]


def test_engines_have_groups_of_their_own() -> None:
    def number(name: str) -> int:
        transfer = SimpleNamespace(engine_id=name)
        return ranks.writer_group(SimpleNamespace(kv_transfer_config=transfer))

    groups = {number(f"engine-{i}") for i in range(100)}
    assert len(groups) == 100
    assert number("engine-1") == number("engine-1")
    assert all(0 <= number < 2**63 for number in groups)


def test_what_computes_is_named_by_its_device_and_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def named(tensor: int, pipeline: int) -> str:
        sizes = SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        return compat.computed_by(SimpleNamespace(parallel_config=sizes))

    def unknown() -> str:
        raise NotImplementedError

    platform = SimpleNamespace(device_type="xpu", get_device_name=lambda: "NVIDIA H200")
    monkeypatch.setattr(compat, "current_platform", platform)
    assert named(1, 1) == "NVIDIA H200, TP 1, PP 1"
    assert named(2, 4) == "NVIDIA H200, TP 2, PP 4"
    platform.get_device_name = lambda: "cpu"
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert named(1, 1) == "cpu of 64 cores, TP 1, PP 1"
    platform.get_device_name = unknown
    assert named(1, 1) == "xpu, TP 1, PP 1"
