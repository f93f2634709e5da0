"""The kernel that hashes what a GPU received, under Triton's interpreter, beside xxhash."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import xxhash

PIECES = 3
CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [256, 320, 1024, 1088, 2048, 5120, 16384, 16448])
def test_sums_are_those_of_xxhash(sum_kernel: ModuleType, size: int) -> None:
    """Less than a block, whole blocks, and what is left of one."""
    data = torch.randint(0, 256, (PIECES, size), dtype=torch.uint8)
    data[0] = 255  # every carry there is
    sums = torch.zeros(PIECES, dtype=torch.int64)
    sum_kernel.SumKernel(size, CPU)(data, sums)
    wanted = [xxhash.xxh3_64_intdigest(row.numpy().tobytes()) for row in data]
    assert [int(value) % 2**64 for value in sums] == wanted


@pytest.mark.parametrize("size", [0, 64, 192, 250, 264, 1000])
def test_sizes_that_do_not_fit_are_refused(sum_kernel: ModuleType, size: int) -> None:
    assert not sum_kernel.fits(size)
    with pytest.raises(ValueError, match="multiples of 64 above 240"):
        sum_kernel.SumKernel(size, CPU)


def test_what_is_not_so_many_pieces_is_refused(sum_kernel: ModuleType) -> None:
    kernel, sums = sum_kernel.SumKernel(256, CPU), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="256 bytes for 2 sums"):
        kernel(torch.zeros(256, dtype=torch.uint8), sums)
    with pytest.raises(ValueError, match="contiguous uint8"):
        kernel(torch.zeros(1024, dtype=torch.uint8)[::2], sums)


def test_what_is_not_as_wanted_is_noted(sum_kernel: ModuleType) -> None:
    """Whichever piece of a row it is, and nothing of other rows."""
    kernel, data = sum_kernel.SumKernel(256, CPU), torch.randint(0, 256, (4, 768)).byte()
    with pytest.raises(ValueError, match="are wanted"):
        kernel.compare(data, *torch.zeros((2, 4, 3)).long(), torch.zeros(4, dtype=torch.bool))
    wanted, sums = torch.zeros((4, 3), dtype=torch.int64), torch.zeros((4, 3), dtype=torch.int64)
    kernel(data, wanted)
    data[1, 767] ^= 1
    data[3, 0] ^= 128
    wrong = torch.full((4,), 7, dtype=torch.uint8)
    kernel.compare(data, sums, wanted, wrong)
    assert wrong.bool().tolist() == [False, True, False, True]
    assert (sums != wanted).nonzero().tolist() == [[1, 2], [3, 0]]
    with pytest.raises(ValueError, match=r"of which \(3, 3\) are wanted"):
        kernel.compare(data, sums, wanted[:3], wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_notes_it_in_the_hosts_memory() -> None:
    from connector.sum_kernel import SumKernel

    kernel = SumKernel(16384, torch.device("cuda"))
    kernel.compile()
    data = torch.randint(0, 256, (64, 8 * 16384), dtype=torch.uint8, device="cuda")
    sums = torch.zeros((64, 8), dtype=torch.int64, device="cuda")
    kernel(data, sums)
    wanted, wrong = sums.cpu().pin_memory(), torch.full((64,), 7, dtype=torch.uint8).pin_memory()
    data[5, -1] ^= 1
    data[63, 0] ^= 128
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        kernel.compare(data, sums, wanted, wrong)
        torch.cuda.current_stream().synchronize()
    assert wrong.nonzero().flatten().tolist() == [5, 63]
