"""PageMap against what attention backends really store: vLLM's CPU backend and stand-ins.

The truth is always the K and V that were handed to `do_kv_cache_update`, never a page
format known to the test and the code alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from connector.page_probe import PageLayoutError
from connector.pages import LayerPages, PageMap

INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
Store = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class FakeImpl:
    """A backend whose page format is given by `store(page, offset, key, value)` per token."""

    kv_cache_dtype = "auto"

    def __init__(self, store: Store) -> None:
        self.store = store
        self.calls = 0

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv: Tensor, slots: Tensor
    ) -> None:
        self.calls += 1
        for i, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, kv.shape[2])
            self.store(kv[block], torch.tensor(offset), key[i], value[i])


def plain(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """FlashAttention: K and V side by side in the content dimension."""
    page[:, offset] = torch.cat((key, value), dim=-1).to(page.dtype)


def amx(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """VNNI tiles: K `[N/16][D/2][16 tokens][2 dims]`, V `[D/16][N/2][16 dims][2 tokens]`."""
    heads, tokens, dim = page.shape[0], page.shape[1], key.shape[-1]
    k_page, v_page = page.view(heads, 2, tokens * dim).unbind(1)
    k_tiles = k_page.view(heads, tokens // 16, dim // 2, 16, 2)
    k_tiles[:, offset // 16, :, offset % 16] = key.view(heads, dim // 2, 2)
    v_tiles = v_page.view(heads, dim // 16, tokens // 2, 16, 2)
    v_tiles[:, :, offset // 2, :, offset % 2] = value.view(heads, dim // 16, 16)


def fp8(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """Fixed scales; V's saturates 1 and 4 to the same code."""
    k = (key.float() / 0.5).to(torch.float8_e4m3fn)
    v = (value.float() / 0.002).clamp(-448, 448).to(torch.float8_e4m3fn)
    page[:, offset] = torch.cat((k, v), dim=-1).view(torch.uint8)


def per_token_int8(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """Codes scaled by the token's own maximum; the scale is kept outside of the page."""
    both = torch.stack((key, value), dim=1).float()
    top = both.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    page[:, offset] = (both / top * 127).round().to(torch.int8).flatten(1)


def inline_scale(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """The last V element makes room for the scale."""
    per_token_int8(page, offset, key, value)
    page[:, offset, -1] = (1 + key.abs().amax(-1)).to(torch.int8)


def skewed(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """A permutation, but dims rotate with the token: not a sum of strides."""
    shift = int(offset)
    page[:, offset] = torch.cat((key.roll(shift, -1), value.roll(shift, -1)), dim=-1)


def swapped_tokens(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """A sum over axes, but the token offsets (0, 1, 3, 2, 4, ...) are not counters."""
    plain(page, torch.tensor({2: 3, 3: 2}.get(int(offset), int(offset))), key, value)


def drops_token(page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    if int(offset) != 3:
        plain(page, offset, key, value)


def fake_layer(store: Store) -> SimpleNamespace:
    return SimpleNamespace(impl=FakeImpl(store))


def cpu_layer(
    monkeypatch: pytest.MonkeyPatch, heads: int, dim: int, dtype: torch.dtype, kv_dtype: str
) -> SimpleNamespace:
    """vLLM's CPU attention on a stand-in layer without `isa` (no metadata builder ran)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu_attn = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config, raising=False)
    impl = cpu_attn.CPUAttentionBackendImpl(heads, dim, 1.0, heads, None, None, kv_dtype)
    return SimpleNamespace(impl=impl, _k_scale_float=1.0, _v_scale_float=1.0)


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Random bits: NaN payloads, infinities and subnormals included."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8).view(dtype).to(device)


def bits(t: Tensor) -> Tensor:
    return t.view(INT[t.element_size()])


def strided(blocks: int, heads: int, tokens: int, dim: int, dtype: Any, layout: str) -> Tensor:
    """A `[B, H, N, 2D]` cache of noise: contiguous, NHD, or one layer of three per block."""
    content = 2 * dim
    if layout == "NHD":
        return noise(blocks, tokens, heads, content, dtype=dtype).transpose(1, 2)
    if layout == "BLHNC":
        return noise(blocks, 3, heads, tokens, content, dtype=dtype)[:, 1]
    if layout == "BHLNC":
        return noise(blocks, heads, 3, tokens, content, dtype=dtype)[:, :, 1]
    return noise(blocks, heads, tokens, content, dtype=dtype)


def copy_of(kv: Tensor) -> tuple[Tensor, Tensor]:
    """The cache with its whole memory (other layers too) copied: (tensor, memory bytes)."""
    memory = torch.empty(0, dtype=torch.uint8, device=kv.device)
    memory = memory.set_(kv.untyped_storage()).clone()
    return memory.view(kv.dtype).as_strided(kv.shape, kv.stride(), kv.storage_offset()), memory


def check_round_trip(
    layer: Any, kv: Tensor, model_dtype: torch.dtype, ratio: int = 1, k: int = 2, m: int = 3
) -> LayerPages:
    """Backend writes -> read equals K/V; write of that into another cache -> same bytes."""
    torch.manual_seed(0)
    blocks, heads, n, dim = kv.shape[0] // ratio, kv.shape[1], kv.shape[2] * ratio, kv.shape[3] // 2
    before, before_memory = copy_of(kv)
    page_map = PageMap.probe(layer, kv, heads, dim, model_dtype, ratio)
    assert (page_map.num_kv_heads, page_map.head_size) == (heads, dim)
    assert (page_map.block_tokens, page_map.element_bytes) == (n, kv.element_size())
    assert torch.equal(copy_of(kv)[1], before_memory), "probing wrote into the cache"

    ids = torch.randperm(blocks)[: m * k].view(m, k)
    key, value = torch.randn(2, m * k * n, heads, dim).to(kv.device, model_dtype).unbind(0)
    slots = (ids.view(-1, 1) * n + torch.arange(n)).flatten().to(kv.device)
    op_layer = layer
    if not hasattr(layer, "isa") and "cpu_attn" in type(layer.impl).__module__:
        op_layer = SimpleNamespace(**vars(layer), isa=builder_isa(layer, model_dtype, n, dim))
    layer.impl.do_kv_cache_update(op_layer, key, value, kv, slots)
    after_memory = copy_of(kv)[1]

    out = torch.zeros(m, 2, heads, k * n, dim, dtype=kv.dtype, device=kv.device)
    page_map.bind(kv).read_chunks(ids.tolist(), out)
    if kv.dtype == model_dtype:
        canonical = torch.stack((key, value)).view(2, m, k * n, heads, dim).permute(1, 0, 3, 2, 4)
        assert torch.equal(bits(out), bits(canonical))
    single = torch.zeros_like(out[1])
    page_map.bind(kv).read_chunk(ids[1].tolist(), single)
    assert torch.equal(bits(single), bits(out[1]))
    assert torch.equal(copy_of(kv)[1], after_memory), "reading wrote into the cache"

    other, _ = copy_of(before)
    pages = page_map.bind(other)
    pages.write_chunks(ids.tolist(), out)
    assert torch.equal(copy_of(other)[1], after_memory)
    return pages


def builder_isa(layer: Any, dtype: torch.dtype, block: int, dim: int) -> str:
    from vllm.v1.attention.backends import cpu_attn

    isa = cpu_attn._get_attn_isa(dtype, block, dim, layer.impl.kv_cache_dtype)
    assert isinstance(isa, str)
    return isa


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80])  # 80: the vec16 format
def test_cpu_backend(
    monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype, dim: int
) -> None:
    layer = cpu_layer(monkeypatch, 4, dim, dtype, "auto")
    check_round_trip(layer, strided(9, 4, block, dim, dtype, "LBHNC"), dtype)
    assert not hasattr(layer, "isa"), "the engine's layer was changed"


def test_cpu_backend_in_a_block_of_several_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = cpu_layer(monkeypatch, 2, 64, torch.float32, "auto")
    layer.isa = builder_isa(layer, torch.float32, 32, 64)
    check_round_trip(layer, strided(9, 2, 32, 64, torch.float32, "BLHNC"), torch.float32)


@pytest.mark.parametrize("kv_dtype", ["fp8", "fp8_e5m2"])
def test_cpu_backend_fp8(monkeypatch: pytest.MonkeyPatch, kv_dtype: str) -> None:
    layer = cpu_layer(monkeypatch, 4, 64, torch.bfloat16, kv_dtype)
    try:
        layer.isa = builder_isa(layer, torch.bfloat16, 32, 64)
    except NotImplementedError as error:
        pytest.skip(str(error))
    layer._k_scale_float = 0.37
    check_round_trip(layer, strided(9, 4, 32, 64, torch.uint8, "LBHNC"), torch.bfloat16)


@pytest.mark.parametrize("dims", [3, 4])
def test_cpu_backend_mla(dims: int) -> None:
    """One plane: vLLM's layer hands the latent and the part with RoPE over apart."""
    module = pytest.importorskip("vllm.v1.attention.backends.mla.cpu_mla")
    impl = module.CPUMLAImpl.__new__(module.CPUMLAImpl)
    impl.kv_lora_rank, impl.kv_cache_dtype = 512, "auto"
    stored = torch.zeros(9, 16, 576, dtype=torch.bfloat16)
    latent, rope = (torch.randn(9 * 16, n, dtype=torch.bfloat16) for n in (512, 64))
    slots = torch.arange(9 * 16)
    impl.do_kv_cache_update(latent, rope.unsqueeze(1), stored, slots, "auto", torch.ones(()))
    kv = stored.unsqueeze(1)
    layer = SimpleNamespace(impl=impl)
    if dims == 3:
        with pytest.raises(PageLayoutError, match="MLA"):
            PageMap.probe(layer, stored, 1, 576, torch.bfloat16)
        return
    pages = PageMap.probe(layer, kv, 1, 576, torch.bfloat16).bind(kv)
    out = torch.empty(2, 1, 1, 48, 576, dtype=torch.bfloat16)
    pages.read_chunks([[7, 2, 3], [8, 1, 0]], out)
    tokens = torch.cat((latent, rope), dim=1).view(9, 16, 576)
    assert torch.equal(out[0, 0, 0], tokens[[7, 2, 3]].view(48, 576))
    assert torch.equal(out[1, 0, 0], tokens[[8, 1, 0]].view(48, 576))
    kv.zero_()
    pages.write_chunks([[7, 2, 3]], out[:1])
    assert torch.equal(stored[[7, 2, 3]], tokens[[7, 2, 3]])
    assert not stored[[0, 1, 4, 5, 6, 8]].any()


@pytest.mark.parametrize("block", [32, 64, 128])
def test_amx_tiles(block: int) -> None:
    check_round_trip(
        fake_layer(amx), strided(9, 2, block, 64, torch.bfloat16, "LBHNC"), torch.bfloat16
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["LBHNC", "NHD", "BLHNC", "BHLNC"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("chunks_and_blocks", [(3, 2), (2, 4)])
def test_plain_layouts(
    device: str, layout: str, heads: int, chunks_and_blocks: tuple[int, int]
) -> None:
    cpu = strided(9, heads, 16, 64, torch.bfloat16, layout)
    memory = copy_of(cpu)[1].to(device).view(cpu.dtype)
    kv = memory.as_strided(cpu.shape, cpu.stride(), cpu.storage_offset())
    m, k = chunks_and_blocks
    check_round_trip(fake_layer(plain), kv, torch.bfloat16, m=m, k=k)


def test_odd_sizes_are_not_widened_beyond_their_alignment() -> None:
    kv = strided(9, 3, 6, 5, torch.bfloat16, "NHD")
    check_round_trip(fake_layer(plain), kv, torch.bfloat16)


def test_kernel_blocks() -> None:
    kv = strided(18, 2, 16, 32, torch.float32, "NHD")
    check_round_trip(fake_layer(plain), kv, torch.float32, ratio=2)


def test_fp8_codes_are_moved_as_they_are() -> None:
    kv = strided(5, 2, 16, 32, torch.uint8, "NHD")
    page_map = PageMap.probe(fake_layer(fp8), kv, 2, 32, torch.bfloat16)
    key, value = torch.randn(2, 16, 2, 32).bfloat16().unbind(0)
    fake_layer(fp8).impl.do_kv_cache_update(None, key, value, kv, torch.arange(48, 64))
    out = torch.zeros(2, 2, 16, 32, dtype=torch.float8_e4m3fn)
    page_map.bind(kv).read_chunk([3], out)
    assert torch.equal(bits(out[0]), bits((key.float() / 0.5).to(out.dtype)).transpose(0, 1))


@pytest.mark.parametrize("store", [plain, amx])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_bits_of_any_pattern_go_through_a_slot_buffer(store: Store, as_bytes: bool) -> None:
    """Buffers that are one layer of a store slot, of integers or of bytes."""
    kv = strided(7, 2, 16, 32, torch.bfloat16, "LBHNC")
    page_map = PageMap.probe(fake_layer(store), kv, 2, 32, torch.bfloat16)
    pages = page_map.bind(kv)
    slots = noise(3, 4, 2, 2, 32, 32, dtype=torch.int16)
    source = slots.view(torch.uint8)[:, 1] if as_bytes else slots[:, 1]
    table = page_map.block_table([[6, 1], [3, 0], [2, 5]], kv.device)
    before = kv[4].clone()
    pages.write_chunks(table, source)
    back = torch.zeros_like(slots)
    pages.read_chunks(table, back.view(torch.uint8)[:, 2] if as_bytes else back[:, 2])
    assert torch.equal(back[:, 2], slots[:, 1])
    assert not back[:, [0, 1, 3]].any()
    assert torch.equal(bits(kv[4]), bits(before))


def test_inference_tensors_can_be_written_outside_inference_mode() -> None:
    with torch.inference_mode():
        kv = torch.zeros(4, 2, 16, 64)
        pages = PageMap.probe(fake_layer(plain), kv, 2, 32, torch.float32).bind(kv)
    source = torch.randn(1, 2, 2, 16, 32)
    pages.write_chunks([[2]], source)
    out = torch.zeros_like(source)
    pages.read_chunks([[2]], out)
    assert torch.equal(out, source)


def test_layers_of_equal_geometry_are_probed_once_and_still_checked() -> None:
    kv = strided(3, 2, 16, 32, torch.float32, "NHD")
    cache: dict[Any, PageMap] = {}
    first, second = fake_layer(plain), fake_layer(plain)
    page_map = PageMap.probe(first, kv, 2, 32, torch.float32, cache=cache)
    assert PageMap.probe(second, kv, 2, 32, torch.float32, cache=cache) is page_map
    assert second.impl.calls == 2 < first.impl.calls
    with pytest.raises(PageLayoutError, match="not stable"):
        PageMap.probe(fake_layer(swapped_tokens), kv, 2, 32, torch.float32, cache=cache)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (inline_scale, "not a rearrangement"),
        (per_token_int8, "scales computed from the data"),
        (skewed, "not a sum of strides"),
        (swapped_tokens, "not a sum of strides"),
        (drops_token, "not a rearrangement"),
        (lambda page, offset, key, value: None, "changed 0 stored elements"),
        (lambda page, offset, key, value: page[:, 99], "refused a scratch page"),
    ],
)
def test_other_formats_are_refused(store: Any, message: str) -> None:
    kv = torch.zeros(3, 2, 16, 64, dtype=torch.int8)
    with pytest.raises(PageLayoutError, match=message):
        PageMap.probe(fake_layer(store), kv, 2, 32, torch.float32)


def test_geometry_is_refused_before_the_backend_is_called() -> None:
    layer = fake_layer(plain)
    for shape in [(3, 16, 64), (3, 1, 16, 576), (3, 2, 16, 68), (3, 4, 16, 64)]:
        with pytest.raises(PageLayoutError, match="MLA"):
            PageMap.probe(layer, torch.zeros(shape), 2, 32, torch.float32)
    layer.impl.kv_sharing_target_layer_name = "layers.0"
    with pytest.raises(PageLayoutError, match=r"layers\.0"):
        PageMap.probe(layer, torch.zeros(3, 2, 16, 64), 2, 32, torch.float32)
    assert layer.impl.calls == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[7]], "does not exist"),
        ([[-1]], "negative"),
        ([[1], [2, 3]], "same number"),
        ([[]], "same"),
    ],
)
def test_bad_block_ids_copy_nothing(ids: list[list[int]], message: str) -> None:
    kv = noise(7, 2, 16, 64)
    before = kv.clone()
    pages = PageMap.probe(fake_layer(plain), kv, 2, 32, torch.float32).bind(kv)
    buffer = torch.zeros(len(ids), 2, 2, 16, 32)
    for transfer in (pages.read_chunks, pages.write_chunks):
        with pytest.raises(ValueError, match=message):
            transfer(ids, buffer)
    with pytest.raises(ValueError, match="twice"):
        pages.write_chunks([[3], [3]], torch.zeros(2, 2, 2, 16, 32))
    assert torch.equal(bits(kv), bits(before))
    assert not buffer.any()


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(1, 2, 2, 32, 32), "expected"),
        (torch.zeros(2, 2, 2, 16, 32), "expected"),
        (torch.zeros(1, 2, 2, 16, 32, dtype=torch.int16), "expected"),
        (torch.zeros(1, 2, 2, 16, 16, dtype=torch.int64), "expected"),
        (torch.zeros(1, 2, 2, 32, 16).transpose(3, 4), "contiguous"),
        (torch.zeros(2049)[1:].view(1, 2, 2, 16, 32), "aligned"),
        (torch.zeros(1, 2, 2, 16, 32, device="meta"), "is on meta"),
    ],
)
def test_bad_buffers_copy_nothing(buffer: Tensor, message: str) -> None:
    kv = noise(7, 2, 16, 64)
    before = kv.clone()
    pages = PageMap.probe(fake_layer(plain), kv, 2, 32, torch.float32).bind(kv)
    for transfer in (pages.read_chunks, pages.write_chunks):
        with pytest.raises(ValueError, match=message):
            transfer([[1]], buffer)
    assert torch.equal(bits(kv), bits(before))


def test_no_chunks_is_no_work() -> None:
    kv = noise(7, 2, 16, 64)
    pages = PageMap.probe(fake_layer(plain), kv, 2, 32, torch.float32).bind(kv)
    pages.write_chunks([], torch.zeros(0, 2, 2, 16, 32))
    pages.read_chunks([], torch.zeros(0, 2, 2, 16, 32))


def test_bind_refuses_another_geometry() -> None:
    kv = noise(7, 2, 16, 64)
    page_map = PageMap.probe(fake_layer(plain), kv, 2, 32, torch.float32, 7)
    for other in (noise(7, 2, 32, 64), strided(7, 2, 16, 32, torch.float32, "NHD")):
        with pytest.raises(ValueError, match="was probed"):
            page_map.bind(other)
    for blocks in (torch.zeros(6, 2, 16, 64), torch.zeros(1, 2, 16, 64).expand(7, -1, -1, -1)):
        with pytest.raises(ValueError, match="distinct blocks"):
            page_map.bind(blocks)
