"""Rows and the small records: what is packed unpacks, and garbage is refused or harmless."""

from __future__ import annotations

import random

import pytest

from prefixstore.rows import (
    CLAIM_EVICT,
    Claim,
    Pending,
    Row,
    pack_address,
    same_place,
    unpack_address,
)


def random_row(rng: random.Random) -> Row:
    return Row(
        flags=rng.randrange(4),
        depth=rng.getrandbits(32),
        slot=rng.getrandbits(32),
        slot_bytes=4096 * rng.randrange(2, 2**20),
        created_s=rng.getrandbits(32),
        expires_s=rng.getrandbits(32),
        namespace=rng.randbytes(16),
        salt=rng.randbytes(8),
        trailer_sum=rng.randbytes(16),
        payload_sum=rng.randbytes(16),
        tag=rng.randbytes(rng.randrange(65)),
        preimage=rng.randbytes(16 + 4 * rng.randrange(65)),
    )


@pytest.mark.parametrize("seed", range(50))
def test_rows_round_trip(seed: int) -> None:
    row = random_row(random.Random(seed))
    assert Row.unpack(row.pack()) == row
    assert row.pack().endswith(row.preimage)  # match compares the tail without unpacking
    assert int.from_bytes(row.pack()[20:24], "little") == row.expires_s  # and reads this
    assert row.with_pin(True).pinned
    assert not row.with_pin(False).pinned
    assert row.with_pin(row.pinned) == row
    assert row.at(7) == row._replace(slot=7)


@pytest.mark.parametrize("seed", range(20))
def test_same_place_is_about_slot_and_content(seed: int) -> None:
    rng = random.Random(seed)
    row = random_row(rng)
    assert same_place(row.pack(), row.with_pin(not row.pinned).pack())
    for change in (
        {"slot": row.slot ^ 1},
        {"slot_bytes": row.slot_bytes ^ 4096},
        {"trailer_sum": rng.randbytes(16)},
        {"payload_sum": rng.randbytes(16)},
        {"namespace": rng.randbytes(16)},
    ):
        assert not same_place(row.pack(), row._replace(**change).pack())


def test_golden_row() -> None:
    """The bytes of format version 1; see docs/format.md."""
    row = Row(3, 5, 6, 0x8000, 7, 8, b"N" * 16, b"S" * 8, b"T" * 16, b"P" * 16, b"tag", b"pre")
    assert row.pack().hex() == (
        "0103" "0300" "05000000" "06000000" "00800000" "07000000" "08000000"
        + (b"N" * 16 + b"S" * 8 + b"T" * 16 + b"P" * 16).hex() + b"tagpre".hex()
    )  # fmt: skip


def test_what_is_no_row_is_refused() -> None:
    good = random_row(random.Random(1)).pack()
    for bad in (b"", good[:79], b"\0" + good[1:], b"\2" + good[1:]):
        with pytest.raises(ValueError, match="not an index row"):
            Row.unpack(bad)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_never_make_anything_but_a_row_or_an_error(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        data = rng.randbytes(rng.randrange(200))
        if rng.random() < 0.5:
            data = b"\1" + data
        try:
            row = Row.unpack(data)
        except ValueError:
            continue
        assert row.pack()[: len(data)] == data or row.tag == data[80:]


def test_addresses_round_trip_and_sort_by_tier_size_slot() -> None:
    rng = random.Random(1)
    places = [(rng.randrange(1, 3), rng.getrandbits(32), rng.getrandbits(32)) for _ in range(500)]
    assert [unpack_address(pack_address(*place)) for place in places] == places
    packed = sorted(pack_address(*place) for place in places)
    assert packed == [pack_address(*place) for place in sorted(places)]


@pytest.mark.parametrize("seed", range(20))
def test_claims_and_pendings_round_trip(seed: int) -> None:
    rng = random.Random(seed)
    claim = Claim(rng.getrandbits(32), CLAIM_EVICT, rng.randbytes(16))
    assert Claim.unpack(claim.pack()) == claim
    pieces = rng.choice([0, 1, 2, 64])
    pending = Pending(
        slot=rng.getrandbits(32),
        slot_bytes=rng.getrandbits(32),
        group=rng.getrandbits(64),
        deadline_s=rng.random() * 2e9,
        namespace=rng.randbytes(16),
        salt=rng.randbytes(8),
        writers=tuple(rng.getrandbits(32) for _ in range(rng.randrange(9))),
        present=bytes(rng.randrange(2) for _ in range(pieces)),
        sums=rng.randbytes(8 * pieces),
    )
    assert Pending.unpack(pending.pack()) == pending
