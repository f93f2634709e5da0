"""SGLang's pages through a store: what one host pool gives another one gets, byte for byte.

The truth is the pool's own `get_data_page`. With SGLang installed these are its own classes, and
its own factory makes the backend; else the double's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prefixstore import Store, admin
from prefixstore.errors import ConfigError, RemoteError
from tests.interop import sglang_double as sglang
from tests.serve.support import ALICE, Running, running, tokens_file
from tests.store_helpers import Place, wait_for

pytest_plugins = ["tests.store_fixtures"]
sglang.install()
from interop.sglang_hicache import PrefixStoreHiCache  # noqa: E402
from interop.sglang_pages import Options  # noqa: E402

PAGE = 4
KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(5)]
AT = [3, 0, 5, 1, 2]  # pages of the pool that hold them
MHA_LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
CASES = [("MHA", one) for one in MHA_LAYOUTS] + [("MLA", one) for one in MHA_LAYOUTS[:3]]
BASE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": sglang.LAYERS,
    "num_attention_heads": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "MHA": {"num_key_value_heads": sglang.HEADS, "head_dim": sglang.DIM},
    "MLA": {"kv_lora_rank": 12, "qk_rope_head_dim": 4},
}
Open = Callable[..., PrefixStoreHiCache]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, shape in SHAPES.items():
        made[kind] = folder = tmp_path_factory.mktemp(kind)
        (folder / "config.json").write_text(json.dumps({**BASE, **shape}))
        save_file({"a": torch.arange(64.0)}, folder / "model.safetensors")
    return made


@pytest.fixture
def served(place: Place) -> Iterator[Running]:
    with place.open("4MiB", "4MiB") as store, running(store) as server:
        yield server


@pytest.fixture
def backend(folders: dict[str, Path], served: Running) -> Iterator[Open]:
    """Opens backends of SGLang processes, as its controller does."""
    opened = []

    def start(pool: Any, *, rank: int = 0, size: int = 1, url: str = "", **more: Any) -> Any:
        kind = "MLA" if type(pool).__name__.startswith("MLA") else "MHA"
        sglang.set_arguments(**{"model_path": str(folders[kind]), **more.pop("args", {})})
        extra = {"prefixstore": {"url": url or served.address, **more}}
        one = PrefixStoreHiCache(sglang.config(pool, extra, rank, size), {})
        opened.append(one)
        one.register_mem_pool_host(pool)
        return one

    yield start
    for one in opened:
        one.close()


def new_pool(kind: str = "MHA", layout: str = "page_first", **changes: Any) -> Any:
    settings = {"page": PAGE, "dtype": torch.bfloat16, **changes}
    return sglang.pool(kind, layout, **settings)


def indices(pages: list[int], page: int = PAGE) -> torch.Tensor:
    return torch.cat([torch.arange(at * page, (at + 1) * page) for at in pages])


def page_of(pool: Any, at: int, page: int = PAGE) -> bytes:
    data: bytes = pool.get_data_page(at * page).contiguous().view(torch.uint8).numpy().tobytes()
    return data


def put(one: PrefixStoreHiCache, pool: Any, zero_copy: bool) -> Any:
    """As `_page_set_zero_copy` and `_generic_page_set` do."""
    if zero_copy:
        return all(one.batch_set_v1(KEYS, indices(AT)))
    return one.batch_set(KEYS, [pool.get_data_page(at * PAGE) for at in AT])


def get(one: PrefixStoreHiCache, pool: Any, to: list[int], zero_copy: bool) -> list[bool]:
    """As `_page_get_zero_copy` and `_generic_page_get` do."""
    if zero_copy:
        return one.batch_get_v1(KEYS, indices(to))
    pages = one.batch_get(KEYS, [pool.get_dummy_flat_data_page() for _ in KEYS])
    for at, page in zip(to, pages, strict=True):
        if page is not None:
            pool.set_from_flat_data_page(at * PAGE, page)
    return [page is not None for page in pages]


@pytest.mark.parametrize("zero_copy", [True, False], ids=["v1", "v0"])
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_pages_come_back_as_they_were(
    backend: Open, kind: str, layout: str, zero_copy: bool
) -> None:
    ours, theirs = new_pool(kind, layout), new_pool(kind, layout)
    writer, reader = backend(ours), backend(theirs)
    assert reader.batch_exists(KEYS) == 0
    assert not any(get(reader, theirs, AT, zero_copy))
    assert put(writer, ours, zero_copy)
    assert put(writer, ours, zero_copy)  # again: they are there
    assert reader.batch_exists(KEYS) == len(KEYS)
    assert reader.batch_exists([KEYS[0], "0" * 64, KEYS[1]]) == 1
    assert reader.exists(KEYS[4])
    to = [4, 5, 0, 2, 1]
    before = page_of(theirs, 3)
    assert all(get(reader, theirs, to, not zero_copy))  # by the other interface: the same bytes
    for source, target in zip(AT, to, strict=True):
        assert page_of(theirs, target) == page_of(ours, source)
    assert page_of(theirs, 3) == before
    one = reader.get(KEYS[2])
    assert one is not None
    assert one.view(torch.uint8).numpy().tobytes() == page_of(ours, AT[2])
    assert reader.get("1" * 64) is None


def test_layouts_of_the_same_order_share_and_others_do_not(backend: Open) -> None:
    ours = new_pool(layout="layer_first")
    assert put(backend(ours), ours, True)
    found = {layout: backend(new_pool(layout=layout)).batch_exists(KEYS) for layout in MHA_LAYOUTS}
    assert found == {"layer_first": 5, "page_first_direct": 5, "page_first": 0, "page_head": 0}
    theirs = new_pool(layout="page_first_direct")
    assert all(get(backend(theirs), theirs, AT, True))
    assert [page_of(theirs, at) for at in AT] == [page_of(ours, at) for at in AT]


def test_who_shares_what(backend: Open) -> None:
    """Only ranks with the same KV: MLA's is the same on all ranks."""
    for kind, expected in (("MHA", False), ("MLA", True)):
        heads: dict[str, Any] = {"heads": sglang.HEADS // 2} if kind == "MHA" else {}
        pool = new_pool(kind, **heads)
        assert put(backend(pool, size=2), pool, True)
        assert backend(new_pool(kind, **heads), rank=1, size=2).exists(KEYS[0]) is expected
        assert backend(new_pool(kind), size=1).exists(KEYS[0]) is expected
        assert backend(new_pool(kind, **heads), size=2).exists(KEYS[0])
    pool = new_pool()
    assert put(backend(pool), pool, True)
    assert backend(new_pool()).exists(KEYS[0])
    overrides = {"json_model_override_args": '{"rope_theta": 5.0}'}
    for other, more in (
        (new_pool(page=8), {}),
        (new_pool(dtype=torch.float16), {}),
        (new_pool(), {"salt": "b"}),
        (new_pool(), {"args": {"quantization": "fp8"}}),
        (new_pool(), {"args": overrides}),
    ):
        assert not backend(other, **more).exists(KEYS[0])


def test_a_server_that_is_away_is_a_miss(
    folders: dict[str, Path], place: Place, tmp_path: Path
) -> None:
    """Before the engine starts, and while it runs; hits come back by themselves."""
    sglang.set_arguments(model_path=str(folders["MHA"]))
    uds = str(tmp_path / "socket")
    token = tmp_path / "token"
    token.write_text(f"{ALICE}\n")
    pool = new_pool()
    options = {"url": f"unix:{uds}", "token_file": str(token), "deadline_s": 0.5}
    one = PrefixStoreHiCache(sglang.config(pool, {"prefixstore": options}))
    one.register_mem_pool_host(pool)

    def nothing() -> None:
        assert one.batch_exists(KEYS) == 0
        assert one.batch_get_v1(KEYS, indices(AT)) == [False] * 5
        assert one.batch_set_v1(KEYS, indices(AT)) == [False] * 5
        assert one.batch_get(KEYS) == [None] * 5
        assert not put(one, pool, False)

    nothing()
    with place.open("4MiB", "4MiB") as store:
        served = {"uds": uds, "tokens": tokens_file(tmp_path)}
        with running(store, **served):
            wait_for(lambda: put(one, pool, True), "the server to be used")
        nothing()
        with running(store, **served):
            wait_for(lambda: one.batch_exists(KEYS) == 5, "hits to come back")
    one.close()
    nothing()


@pytest.mark.parametrize("disk", [0, "4MiB"], ids=["memory only", "with a disk"])
def test_a_folder_will_do(folders: dict[str, Path], place: Place, disk: int | str) -> None:
    """A page damaged in memory is missed, or comes from the disk once it is there."""
    sglang.set_arguments(model_path=str(folders["MHA"]))
    with place.open("4MiB", disk) as store:
        url = {"prefixstore": {"url": f"dir:{store.folder}"}}
        pool = new_pool()
        one = PrefixStoreHiCache(sglang.config(pool, url))
        one.register_mem_pool_host(pool)
        assert put(one, pool, True)
        assert not one.clear()
        assert admin.verify(store).sound
        assert one.batch_exists(KEYS) == 5
        assert store.flush()  # else it is chance whether the disk has the page
        _flip_in(store, page_of(pool, AT[1])[:64])
        assert get(one, pool, [6, 7, 6, 6, 6], True) == [True, bool(disk), True, True, True]
        assert not disk or page_of(pool, 7) == page_of(pool, AT[1])
        one.close()


def _flip_in(store: Store, piece: bytes) -> None:
    live = store.settings.live_dir(store.folder)
    for path in live.rglob("*"):
        if path.is_file() and (at := path.read_bytes().find(piece)) >= 0:
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([piece[0] ^ 255]))
            return
    raise AssertionError("the page is not in the memory tier")


def test_what_cannot_be_right_is_refused(
    backend: Open, served: Running, tmp_path: Path, place: Place
) -> None:
    def refused(words: str, pool: Any, **more: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            backend(pool, **more)

    pool = new_pool()
    refused("LoRA", pool, args={"enable_lora": True})
    refused("LoRA", pool, args={"lora_paths": ["a"]})
    refused("random weights", pool, args={"load_format": "dummy"})
    refused("KV scales from a file", pool, args={"quantization_param_path": "a.json"})
    refused("cannot find the files", pool, args={"model_path": "no/such-model"})
    refused("heads, head size", new_pool(heads=1))
    refused("heads, head size", pool, size=2)
    refused("KV in int8", new_pool(dtype=torch.int8))
    refused("unknown entries", pool, uri="x")
    refused("no address", pool, url="memcached://a")
    draft = new_pool()
    draft.layer_num += 1
    refused("draft model", draft)
    other = new_pool()
    other.layout = "page_first_kv_split"
    refused("host pool", other)
    mamba = type("MambaPoolHost", (type(pool),), {})
    odd = new_pool()
    odd.__class__ = mamba
    refused("MambaPoolHost", odd)
    with pytest.raises(ConfigError, match=r"no prefixstore\.url"):
        Options.parse({"backend_name": "prefixstore"})
    with pytest.raises(ConfigError, match="a pool mamba"):
        backend(new_pool()).register_mem_host_pool_v2(pool, "mamba")
    config = sglang.config(pool, {"prefixstore": {"url": served.address}})
    config.attn_cp_size = 2
    with pytest.raises(ConfigError, match="context parallelism"):
        PrefixStoreHiCache(config)
    uds = str(tmp_path / "socket")
    with (
        place.open("4MiB", 0, "other") as store,
        running(store, uds=uds, tokens=tokens_file(tmp_path)),
        pytest.raises(RemoteError, match="no valid token"),
    ):
        backend(pool, url=f"unix:{uds}")


@pytest.mark.skipif(not sglang.REAL, reason="SGLang is not installed: its factory is not tried")
def test_sglangs_own_factory_loads_it(folders: dict[str, Path], served: Running) -> None:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    sglang.set_arguments(model_path=str(folders["MHA"]))
    pool = new_pool()
    extra = {
        "backend_name": "prefixstore", "module_path": "interop.sglang_hicache",
        "class_name": "PrefixStoreHiCache", "interface_v1": 1,
        "prefixstore": {"url": served.address},
    }  # fmt: skip
    one = StorageBackendFactory.create_backend("dynamic", sglang.config(pool, extra), pool)
    assert isinstance(one, HiCacheStorage)
    one.register_mem_pool_host(pool)
    theirs = new_pool()
    other = StorageBackendFactory.create_backend("dynamic", sglang.config(theirs, extra), theirs)
    other.register_mem_pool_host(theirs)
    for zero_copy in (True, False):
        tokens = list(range(10 + zero_copy, 10 + zero_copy + 3 * PAGE))
        _back_up(one, pool, tokens, [2, 7, 4], zero_copy)
        assert _prefetch(other, theirs, tokens + [1] * PAGE, [1, 5, 3, 8], zero_copy) == 3 * PAGE
        assert [page_of(theirs, at) for at in (1, 5, 3)] == [page_of(pool, at) for at in (2, 7, 4)]
    one.close()
    other.close()


def _controller(one: Any, pool: Any, zero_copy: bool) -> Any:
    """SGLang's controller, without the device it would want to begin with."""
    from sglang.srt.managers.cache_controller import HiCacheController

    made = HiCacheController.__new__(HiCacheController)
    made.storage_backend, made.mem_pool_host = one, pool
    made.page_size, made.storage_batch_size = PAGE, 2
    made.page_get_func = made._page_get_zero_copy if zero_copy else made._generic_page_get
    made.page_set_func = made._page_set_zero_copy if zero_copy else made._generic_page_set
    made.get_hash_str = get_hash_str
    return made


def get_hash_str(tokens: list[int], prior: str | None = None) -> str:
    """SGLang's hash of a page behind the hash of those before it."""
    from sglang.srt.mem_cache.hicache_storage import get_hash_str as theirs

    return str(theirs(tokens, prior))


def _back_up(one: Any, pool: Any, tokens: list[int], pages: list[int], zero_copy: bool) -> None:
    from sglang.srt.managers.cache_controller import StorageOperation

    keys: list[str] = []
    for at in range(0, len(tokens), PAGE):
        keys.append(get_hash_str(tokens[at : at + PAGE], keys[-1] if keys else None))
    operation = StorageOperation(indices(pages), tokens, hash_value=keys)
    _controller(one, pool, zero_copy)._page_backup(operation)
    assert operation.completed_tokens == len(tokens)


def _prefetch(one: Any, pool: Any, tokens: list[int], pages: list[int], zero_copy: bool) -> int:
    from sglang.srt.managers.cache_controller import PrefetchOperation

    controller = _controller(one, pool, zero_copy)
    operation = PrefetchOperation("request", indices(pages), tokens)
    operation.hash_value, hit = controller._storage_hit_query(operation)
    controller._page_transfer(operation)
    assert operation.completed_tokens == hit
    return int(hit)
