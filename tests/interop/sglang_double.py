"""What SGLang's HiCache shows a storage backend, where SGLang is not installed.

Written from SGLang 0.5.10: `HiCacheStorage`'s methods, the storage config, the arguments, and host
pools with the same memory layouts. Where SGLang is installed, its own classes are used instead.
"""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

REAL = "sglang" in sys.modules or importlib.util.find_spec("sglang") is not None
LAYERS, HEADS, DIM, PAGES = 3, 2, 8, 9


class _Storage(ABC):
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    @abstractmethod
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> Any: ...

    @abstractmethod
    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool: ...

    @abstractmethod
    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool: ...

    @abstractmethod
    def exists(self, key: str) -> bool: ...


@dataclass
class _Config:
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    extra_config: dict[str, Any] | None = None


@dataclass
class _Arguments:
    """The double's `ServerArgs`, as far as it is read."""

    model_path: str = ""
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    quantization_param_path: str | None = None
    load_format: str = "auto"
    enable_lora: bool | None = None
    lora_paths: list[str] | None = None
    torchao_config: str = ""
    model_impl: str = "auto"
    context_length: int | None = None
    json_model_override_args: str = "{}"


@dataclass
class _Pool:
    """A host pool with one of SGLang's layouts."""

    device_pool: Any
    ratio: float
    host_size: int
    page_size: int
    layout: str
    pin_memory: bool = False
    planes: int = field(default=2, init=False)

    def __post_init__(self) -> None:
        device, size = self.device_pool, self.page_size * PAGES
        self.dtype, self.size, self.page_num = device.store_dtype, size, PAGES
        self.start_layer, self.end_layer = device.start_layer, device.end_layer
        self.layer_num = device.layer_num
        self.head_num, self.head_dim = self._row()
        rows = (self.head_num, self.head_dim)
        layers, page = self.layer_num, self.page_size
        self.page_dims, dims = {
            "layer_first": ((layers, page, *rows), (layers, size, *rows)),
            "page_first": ((page, layers, *rows), (size, layers, *rows)),
            "page_first_direct": ((1, layers, page, *rows), (PAGES, layers, page, *rows)),
            "page_head": (
                (1, rows[0], page, layers, rows[1]),
                (PAGES, rows[0], page, layers, rows[1]),
            ),
            "page_first_kv_split": ((1,), (1,)),
        }[self.layout]
        self.kv_buffer = torch.empty((self.planes, *dims), dtype=self.dtype)

    def _row(self) -> tuple[int, int]:
        return self.device_pool.head_num, self.device_pool.head_dim

    def _page(self, index: int) -> torch.Tensor:
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + self.page_size]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + self.page_size]
        at = index // self.page_size
        return self.kv_buffer[:, at : at + 1]

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self._page(index).flatten() if flat else self._page(index)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self._page(index)[:] = data_page.reshape(self.planes, *self.page_dims)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        elements = self.layer_num * self.page_size * self.head_num * self.head_dim
        return torch.zeros(self.planes * elements, dtype=self.dtype)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        assert self.layout != "layer_first"
        plane = self.kv_buffer[0].numel() * self.dtype.itemsize
        token = self.layer_num * self.head_num * self.head_dim * self.dtype.itemsize
        starts = indices.tolist()[:: self.page_size]
        pointers = [
            self.kv_buffer.data_ptr() + start * token + number * plane
            for start in starts
            for number in range(self.planes)
        ]
        return pointers, [self.page_size * token] * len(pointers)


class MHATokenToKVPoolHost(_Pool):
    """K and V of each head."""


class MLATokenToKVPoolHost(_Pool):
    """One latent a token."""

    def _row(self) -> tuple[int, int]:
        self.planes = 1
        self.kv_cache_dim = self.device_pool.kv_lora_rank + self.device_pool.qk_rope_head_dim
        return 1, self.kv_cache_dim


class MambaPoolHost(MHATokenToKVPoolHost):
    """Not a pool of KV."""


def install() -> None:
    """Have `import sglang...` find the double, if there is no SGLang."""
    if REAL:
        return
    parents = ["sglang", "sglang.srt", "sglang.srt.mem_cache"]
    modules = {name: ModuleType(name) for name in [*parents, f"{parents[2]}.hicache_storage"]}
    modules["sglang.srt.server_args"] = arguments = ModuleType("sglang.srt.server_args")
    for name in parents:
        modules[name].__path__ = []
    storage: Any = modules["sglang.srt.mem_cache.hicache_storage"]
    storage.HiCacheStorage, storage.HiCacheStorageConfig = _Storage, _Config
    held: dict[str, Any] = {}
    hooks: Any = arguments
    hooks.get_global_server_args = lambda: held["args"]
    hooks.set_global_server_args_for_scheduler = lambda args: held.update(args=args)
    sys.modules.update(modules)


def set_arguments(**changes: Any) -> None:
    """What SGLang was started with."""
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(_Arguments(**changes))


def config(pool: Any, extra: dict[str, Any], rank: int = 0, size: int = 1) -> Any:
    """A storage config, as SGLang's controller makes it."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    mla = type(pool).__name__ == "MLATokenToKVPoolHost"
    return HiCacheStorageConfig(
        tp_rank=rank, tp_size=size, pp_rank=0, pp_size=1, is_mla_model=mla,
        enable_storage_metrics=False, is_page_first_layout=pool.layout == "page_first",
        model_name="a-name", extra_config=extra,
    )  # fmt: skip


def pool(kind: str, layout: str, page: int, dtype: torch.dtype, heads: int = HEADS) -> Any:
    """A host pool of PAGES pages with random KV, as beside a device pool of this shape."""
    device = SimpleNamespace(
        store_dtype=dtype, dtype=dtype, size=page * (PAGES - 2), device="cpu", head_num=heads,
        head_dim=DIM, layer_num=LAYERS, start_layer=0, end_layer=LAYERS, kv_lora_rank=12,
        qk_rope_head_dim=4,
    )  # fmt: skip
    if REAL:
        from sglang.srt.mem_cache import memory_pool_host as home
    else:
        home = sys.modules[__name__]
    ratio = (page * (PAGES - 1)) / device.size
    made = getattr(home, f"{kind}TokenToKVPoolHost")(device, ratio, 0, page, layout, False)
    made.kv_buffer.view(torch.uint8).random_()
    return made
