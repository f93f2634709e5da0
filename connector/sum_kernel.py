"""xxh3_64 of many equal pieces at once, by a Triton kernel: what the GPU received, it checks.

Checking on the host takes a copy out of the tier first, so that nothing changes between check and
use: that copy and its hash are what a load by way of the host spends its time on. The GPU hashes at
the speed of its memory.

Algorithm: XXH3 64 bits, inputs above 240 bytes, default secret, no seed (xxHash's specification,
``doc/xxhash_spec.md``). Lengths must be multiples of 64, as those of pieces are for all but odd
sizes; `fits` tells.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from connector.compiling import compiling

STRIPE_BYTES, LANES, STRIPES = 64, 8, 16  # STRIPES in a block, then the accumulators are scrambled
LONG_BYTES = 240  # up to this XXH3 has other ways
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_START = (
    _PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1
)  # fmt: skip
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578"
    "825ad07dccff7221b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea3"
    "71644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931"
    "c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_LAST_STRIPE_AT, _MERGE_AT, _SCRAMBLE_AT = 192 - 64 - 7, 11, 192 - 64


def _words(at: int, count: int) -> list[int]:
    return [
        int.from_bytes(_SECRET[start : start + 8], "little", signed=True)
        for start in range(at, at + 8 * count, 8)
    ]


def _tables() -> list[int]:
    """What the kernel looks up: the secret's words at each place it is used, and the start."""
    start = [int.from_bytes(value.to_bytes(8, "little"), "little", signed=True) for value in _START]
    return [
        *_words(0, STRIPES + LANES - 1),  # stripe n, lane i: word n + i
        *_words(_SCRAMBLE_AT, LANES),
        *_words(_LAST_STRIPE_AT, LANES),
        *_words(_MERGE_AT, LANES),
        *start,
    ]


_SCRAMBLE = STRIPES + LANES - 1
_LAST, _MERGE, _BEGIN = _SCRAMBLE + LANES, _SCRAMBLE + 2 * LANES, _SCRAMBLE + 3 * LANES


@triton.jit
def _plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit
def _added(data, swapped, key, there):  # type: ignore[no-untyped-def]
    """What stripes ``[n, lane]`` add to the accumulators."""
    mixed = data ^ key
    product = (mixed & 0xFFFFFFFF) * ((mixed >> 32) & 0xFFFFFFFF)
    return tl.reduce(tl.where(there, swapped + product, 0), 0, _plus)


@triton.jit
def _folded(one, other):  # type: ignore[no-untyped-def]
    """The halves of the 128-bit product, one xor the other; by 32-bit parts."""
    a, b = one & 0xFFFFFFFF, (one >> 32) & 0xFFFFFFFF
    c, d = other & 0xFFFFFFFF, (other >> 32) & 0xFFFFFFFF
    low, left, right = a * c, b * c, a * d
    middle = ((low >> 32) & 0xFFFFFFFF) + (left & 0xFFFFFFFF) + right
    upper = b * d + ((left >> 32) & 0xFFFFFFFF) + ((middle >> 32) & 0xFFFFFFFF)
    return upper ^ ((middle << 32) | (low & 0xFFFFFFFF))


# Else it would compile within a load, for another number of pieces.
@triton.jit(do_not_specialize=["chunks", "sums", "wanted", "wrong", "per_chunk"])
def _hash(  # type: ignore[no-untyped-def]
    pieces, chunks, sums, wanted, wrong, tables, per_chunk, piece_words, full_blocks, left_stripes,
    prime32, prime64, avalanche,
    scramble_at: tl.constexpr, last_at: tl.constexpr, merge_at: tl.constexpr,
    begin_at: tl.constexpr, stripes: tl.constexpr, lanes: tl.constexpr, chosen: tl.constexpr,
    compared: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    number = at.to(tl.int64)
    if compared:
        right = tl.load(wanted + at)  # from the host's memory: it comes while the piece is hashed
    if chosen:
        number = tl.load(chunks + at // per_chunk) * per_chunk + at % per_chunk
    piece = pieces + number * piece_words
    stripe, lane = tl.arange(0, stripes)[:, None], tl.arange(0, lanes)
    place = stripe * lanes + lane[None, :]
    other = stripe * lanes + (lane[None, :] ^ 1)
    key = tl.load(tables + stripe + lane[None, :])
    scramble = tl.load(tables + scramble_at + lane)
    acc = tl.load(tables + begin_at + lane)
    every = stripe < stripes
    for block in range(full_blocks):
        start = piece + block * (stripes * lanes)
        acc += _added(tl.load(start + place), tl.load(start + other), key, every)
        acc = (acc ^ ((acc >> 47) & 0x1FFFF) ^ scramble) * prime32
    start = piece + full_blocks * (stripes * lanes)
    there = stripe < left_stripes
    data, swapped = tl.load(start + place, there, 0), tl.load(start + other, there, 0)
    acc += _added(data, swapped, key, there)
    final = piece + piece_words - lanes
    mixed = tl.load(final + lane) ^ tl.load(tables + last_at + lane)
    acc += tl.load(final + (lane ^ 1)) + (mixed & 0xFFFFFFFF) * ((mixed >> 32) & 0xFFFFFFFF)
    even, odd = tl.split(tl.reshape(acc ^ tl.load(tables + merge_at + lane), (lanes // 2, 2)))
    result = piece_words * 8 * prime64 + tl.reduce(_folded(even, odd), 0, _plus)
    result = (result ^ ((result >> 37) & 0x7FFFFFF)) * avalanche
    result ^= (result >> 32) & 0xFFFFFFFF
    tl.store(sums + at, result)
    if compared:
        tl.store(wrong + at // per_chunk, 1, mask=result != right)


def fits(piece_bytes: int) -> bool:
    """Whether pieces of that size can be hashed here."""
    return piece_bytes % STRIPE_BYTES == 0 and piece_bytes > LONG_BYTES


class SumKernel:
    """Hashes pieces of one size on one device; work is enqueued on the current stream."""

    def __init__(self, piece_bytes: int, device: torch.device) -> None:
        """Raises ValueError for sizes that do not fit."""
        if not fits(piece_bytes):
            raise ValueError(f"pieces of {piece_bytes} bytes; multiples of 64 above 240 wanted")
        self._words = piece_bytes // 8
        self._full = (piece_bytes - 1) // (STRIPES * STRIPE_BYTES)
        self._left = (piece_bytes - 1) // STRIPE_BYTES - self._full * STRIPES
        self._tables = torch.tensor(_tables(), dtype=torch.int64, device=device)

    def compile(self) -> None:
        """Hash a piece in each way: compiling takes a second or so, and may fail."""
        device = self._tables.device
        pinned = device.type == "cuda"
        piece = torch.zeros((1, 8 * self._words), dtype=torch.uint8, device=device)
        sums = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self(piece, sums)
        self(piece, sums, torch.zeros(1, dtype=torch.int64, device=device))
        wanted = torch.zeros((1, 1), dtype=torch.int64, pin_memory=pinned)
        self.compare(piece, sums, wanted, torch.zeros(1, dtype=torch.uint8, pin_memory=pinned))
        if pinned:  # until then it reads and writes there
            torch.cuda.current_stream(device).synchronize()

    def __call__(
        self, data: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor | None = None
    ) -> None:
        """``data``: contiguous uint8, so many whole pieces; ``sums``: int64, one for each (the bits
        of the unsigned sum). ``rows``: int64 ``[n]`` on the device, the rows of ``data`` to hash;
        ``sums`` is ``[n, pieces of a row]`` then. Raises ValueError for other sizes, RuntimeError
        if the kernel cannot be compiled."""
        self._launch(data, sums, rows=rows)

    def compare(
        self, data: torch.Tensor, sums: torch.Tensor, wanted: torch.Tensor, wrong: torch.Tensor
    ) -> None:
        """The same, and which rows are ``wrong``, uint8 ``[n]``, not 0 for those: one of their sums
        is not what is ``wanted``, int64 ``[n, pieces of a row]``. These two are on the device or in
        pinned memory, from where the kernel reads and writes them: nothing else may be under way
        there."""
        if (
            (wanted.shape, len(wrong)) != (sums.shape, len(sums))
            or (wanted.dtype, wrong.dtype) != (torch.int64, torch.uint8)
            or not (wanted.is_contiguous() and wrong.is_contiguous())
        ):  # fmt: skip
            raise ValueError(f"sums {tuple(sums.shape)}, of which {tuple(wanted.shape)} are wanted")
        wrong.zero_()
        self._launch(data, sums, compared=(wanted, wrong))

    def _launch(
        self,
        data: torch.Tensor,
        sums: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,
        compared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        if not (data.is_contiguous() and data.dtype == torch.uint8):
            raise ValueError("pieces must be contiguous uint8")
        num_bytes = data.numel() if rows is None else data[0].numel() * rows.numel()
        if num_bytes != 8 * self._words * sums.numel():
            raise ValueError(f"{num_bytes} bytes for {sums.numel()} sums")
        unused = self._tables
        with compiling():
            _hash[(sums.numel(),)](
                data.view(-1).view(torch.int64), unused if rows is None else rows, sums,
                *((unused, unused) if compared is None else compared),
                self._tables, sums.shape[-1], self._words, self._full, self._left,
                _PRIME32_1, _signed(_PRIME64_1), _signed(0x165667919E3779F9),
                scramble_at=_SCRAMBLE, last_at=_LAST, merge_at=_MERGE, begin_at=_BEGIN,
                stripes=STRIPES, lanes=LANES, chosen=rows is not None,
                compared=compared is not None, num_warps=1,
            )  # fmt: skip


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
