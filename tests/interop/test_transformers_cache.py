"""KV of Hugging Face models through a store. The truth is the model's own cache, cut where the
stored prefix ends (so that both compute the same rows in the same steps), and plain `generate`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from benchmarks.model import demo_text, make_model
from interop.transformers_cache import load_prefix, save_prefix
from prefixstore import ModelIdentity, Store, admin
from prefixstore import open as open_store
from prefixstore.errors import ConfigError, StoreError
from prefixstore.interface import StoreLike
from tests.serve.support import running
from tests.store_helpers import Place, wait_for

pytest_plugins = ["tests.store_fixtures"]

SIZE, NEW = 16, 12
WORDS = random.Random(7)
IDS = torch.tensor([WORDS.choices(range(1, 512), k=5 * SIZE + 7)])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    text = demo_text()
    parent = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "vocab": 512}
    return {
        arch: make_model(parent / arch, text=text, arch=arch, head_dim=32, **sizes)
        for arch in ("llama", "qwen3")
    }


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def generate(model: Any, ids: torch.Tensor, cache: DynamicCache | None = None) -> Any:
    with torch.no_grad():
        return model.generate(
            ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip


def own_cache(model: Any, ids: torch.Tensor, length: int) -> DynamicCache:
    """The model's KV of the first tokens, as it would be computed with nothing stored."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :length], past_key_values=cache)
    return cache


@pytest.fixture(params=["folder", "http"])
def store(request: pytest.FixtureRequest, place: Place) -> Iterator[StoreLike]:
    with place.open("16MiB", "16MiB") as opened:
        if request.param == "folder":
            yield opened
            return
        with running(opened) as server, open_store(server.address) as client:
            yield client


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_generate_behind_a_stored_prefix_is_generate(
    folders: dict[str, Path], arch: str, dtype: torch.dtype, store: StoreLike
) -> None:
    model = load(folders[arch], dtype)
    length = 5 * SIZE
    assert load_prefix(store, model, IDS, chunk_tokens=SIZE).get_seq_length() == 0
    truth = own_cache(model, IDS, length)
    assert save_prefix(store, model, IDS, truth, chunk_tokens=SIZE) == length

    again = load(folders[arch], dtype)  # another process has nothing but the folder and the store
    cache = load_prefix(store, again, IDS, chunk_tokens=SIZE)
    assert cache.get_seq_length() == length
    for ours, theirs in zip(cache.layers, truth.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    stored, plain = generate(again, IDS, cache), generate(model, IDS, truth)
    assert torch.equal(stored.sequences, plain.sequences)
    for ours, theirs in zip(stored.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    cold = generate(model, IDS)
    assert torch.equal(stored.sequences, cold.sequences)
    # Of another prompt only what it shares is there, and it comes out as if computed.
    other = IDS.clone()
    other[0, 2 * SIZE + 3] += 1
    shared = load_prefix(store, again, other, chunk_tokens=SIZE)
    assert shared.get_seq_length() == 2 * SIZE
    assert torch.equal(generate(again, other, shared).sequences, generate(model, other).sequences)


def test_what_generate_has_computed_is_stored_too(
    folders: dict[str, Path], store: StoreLike
) -> None:
    model = load(folders["llama"])
    out = generate(model, IDS)
    ids, held = out.sequences[0], IDS.shape[1] + NEW - 1  # the last token was never fed
    whole = held // SIZE * SIZE
    assert save_prefix(store, model, ids, out.past_key_values, chunk_tokens=SIZE) == whole
    assert whole > 5 * SIZE
    cache = load_prefix(store, model, ids.tolist(), chunk_tokens=SIZE)
    assert cache.get_seq_length() == whole
    exact = load_prefix(store, model, ids[:whole], chunk_tokens=SIZE)
    assert exact.get_seq_length() == whole - 1  # the last token of a prompt is computed
    longer = generate(model, ids[None], cache)
    assert torch.equal(longer.sequences, generate(model, ids[None]).sequences)


def test_nobody_else_gets_it(folders: dict[str, Path], place: Place) -> None:
    """Not vLLM, not another attention, dtype, salt, or another model; nor theirs here."""
    with place.open("16MiB", "16MiB") as store:
        model = load(folders["llama"])
        save_prefix(store, model, IDS, own_cache(model, IDS, SIZE), chunk_tokens=SIZE)
        [record] = store.namespaces()
        engine = ModelIdentity.from_folder(folders["llama"], chunk_tokens=SIZE)
        told = record.identity.explain_mismatch(engine)
        assert "engine_settings" in told
        assert '"transformers"' in told
        for other in (
            load(folders["llama"], attn_implementation="eager"),
            load(folders["llama"], torch.bfloat16),
            load(folders["qwen3"]),
        ):
            assert load_prefix(store, other, IDS, chunk_tokens=SIZE).get_seq_length() == 0
        changed = load(folders["llama"])
        changed.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
        salted: dict[str, Any] = {"salt": b"x"}
        for other, more in ((model, salted), (model, {"chunk_tokens": 8}), (changed, {})):
            options: dict[str, Any] = {"chunk_tokens": SIZE, **more}
            assert load_prefix(store, other, IDS, **options).get_seq_length() == 0
        assert load_prefix(store, model, IDS, chunk_tokens=SIZE).get_seq_length() == SIZE


def test_an_address_is_opened_and_closed(folders: dict[str, Path], place: Place) -> None:
    model = load(folders["llama"])
    url = f"dir:{place.folder / 'kv'}"
    options: dict[str, Any] = {"memory_dir": str(place.memory_dir), "memory_bytes": "4MiB"}
    cache = own_cache(model, IDS, 2 * SIZE)
    assert save_prefix(url, model, IDS, cache, chunk_tokens=SIZE, **options) == 2 * SIZE
    with place.open("4MiB", None, "kv") as store:
        assert admin.verify(store).chunks["disk"] == 2
        admin.empty_memory(store)  # from the disk tier, then
    assert load_prefix(url, model, IDS, chunk_tokens=SIZE).get_seq_length() == 2 * SIZE


def test_damage_costs_the_chunks_behind_it_only(folders: dict[str, Path], place: Place) -> None:
    model = load(folders["llama"])
    with place.open("16MiB", 0) as store:
        save_prefix(store, model, IDS, own_cache(model, IDS, 4 * SIZE), chunk_tokens=SIZE)
        [record] = store.namespaces()
        namespace = store.namespace(record.identity, record.layout)
        assert isinstance(store, Store)
        payload = own_cache(model, IDS, 4 * SIZE).layers[1].values[0, 1, 2 * SIZE : 3 * SIZE]
        _flip(place.memory_dir, payload.contiguous().numpy().tobytes())
        cache = load_prefix(store, model, IDS, chunk_tokens=SIZE)
        assert cache.get_seq_length() == 2 * SIZE
        chain = namespace.chain(IDS[0].numpy())
        wait_for(lambda: namespace.match(chain).num_chunks == 2, "the damaged chunk to be dropped")
        truth = own_cache(model, IDS, 2 * SIZE)
        assert torch.equal(cache.layers[1].values, truth.layers[1].values)


def _flip(folder: Path, piece: bytes) -> None:
    """Change one byte of a piece of KV, wherever the memory tier has it."""
    changed = 0
    for path in folder.rglob("*"):
        if path.is_file() and (at := path.read_bytes().find(piece)) >= 0:
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([piece[0] ^ 1]))
            changed += 1
    assert changed == 1


def test_what_cannot_be_kept_is_refused(folders: dict[str, Path], place: Place) -> None:
    model = load(folders["llama"])
    with place.open("4MiB", 0) as store:

        def refused(words: str, model: Any, cache: Any, ids: Any = IDS) -> None:
            with pytest.raises(ConfigError, match=words):
                save_prefix(store, model, ids, cache, chunk_tokens=SIZE)

        cache = own_cache(model, IDS, SIZE)
        refused("of one prompt", model, cache, torch.zeros((2, SIZE), dtype=torch.int64))
        refused("of one prompt", model, cache, torch.zeros(SIZE))
        refused("expected", model, own_cache(model, IDS.repeat(2, 1), SIZE))
        refused("expected", model, own_cache(load(folders["llama"], torch.bfloat16), IDS, SIZE))
        small = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=600)
        other = GPT2LMHeadModel(small).eval()
        refused("not loaded from a folder", other, own_cache(other, IDS, SIZE))
        refused("2 layers that keep", model, own_cache(other, IDS, SIZE))
        sliding = load(folders["qwen3"])
        sliding.config.layer_types = ["sliding_attention", "full_attention"]
        sliding.config.sliding_window = 8
        refused("do not keep every token", sliding, cache)
        stretched = load(folders["llama"])
        stretched.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
        refused("depends on the prompt's length", stretched, cache)
        adapted = load(folders["llama"])
        adapted.peft_config = {"default": None}
        refused("adapters", adapted, cache)
        with pytest.raises(ConfigError, match="a store that is open"):
            load_prefix(store, model, IDS, token="x" * 20)
        assert not store.namespaces()
    with pytest.raises(StoreError, match="server running"):
        load_prefix("http://127.0.0.1:9", model, IDS)
