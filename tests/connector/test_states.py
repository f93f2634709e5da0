"""States in a chunk's place: their form, their pages, and which of them are saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from connector import states
from connector.groups import KvGroup
from connector.messages import SaveJob
from connector.options import RequestOptions
from connector.plan import LoadPlanner
from connector.states import StateForm, StatePages
from connector.tracked import Tracked
from prefixstore.keys import KeyChain
from prefixstore.layout import Layout
from tests.connector.played_worker import IDENTITY

CHUNK, BLOCK = 8, 4
GROUPS = (KvGroup(BLOCK, 2), KvGroup(BLOCK, 0))


def spec(**changes: Any) -> Any:
    """A layer's states: a convolution's 2 x 3 bfloat16, and 5 float32."""
    values: dict[str, Any] = {
        "shapes": ((2, 3), (5,)),
        "dtypes": (torch.bfloat16, torch.float32),
        "mamba_cache_mode": "align",
        "num_speculative_blocks": 0,
        "mamba_type": SimpleNamespace(name="MAMBA2"),
    }
    return SimpleNamespace(**{**values, **changes})


def form(ranks: int = 1, num_layers: int = 3, backend: str = "cpu") -> StateForm:
    return states.form_of([(group, spec()) for group in GROUPS], num_layers, ranks, CHUNK, backend)


def config(stages: int = 1) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=stages))


# ---------------------------------------------------------------------- the form
def test_a_record_has_room_for_each_tensor_on_its_own() -> None:
    layout = form(ranks=2).layout
    assert layout == Layout(3, 1, 2, CHUNK, 16)
    assert layout.piece_bytes >= 16 + 32  # 12 bytes and 20, each rounded up to 16


@pytest.mark.parametrize(
    ("specs", "stages", "named"),
    [
        ([spec(mamba_cache_mode="none")], 1, "turn prefix caching on"),
        ([spec(mamba_cache_mode="all")], 1, "mode all"),
        ([spec(num_speculative_blocks=2)], 1, "speculative"),
        ([spec()], 2, "pipeline"),
        ([spec(), spec(shapes=((2, 3), (6,)))], 1, "several forms"),
        ([spec(), spec(mamba_type=SimpleNamespace(name="GDN"))], 1, "several forms"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(specs: list[Any], stages: int, named: str) -> None:
    assert named in states.refusal(config(stages), specs)
    assert states.refusal(config(), [spec(), spec()]) == ""


def test_states_have_an_identity_of_their_own() -> None:
    """Of the model, where its KV is, their form, how many ranks share them, what computes them."""
    model, name = IDENTITY, IDENTITY.namespace
    one = form(1).identity(model, name)
    other = states.form_of([(GROUPS[0], spec(shapes=((6,), (5,))))], 3, 1, CHUNK, "cpu")
    others = [
        form(2).identity(model, name),
        form(backend="cuda").identity(model, name),  # arranges a page in its own way
        other.identity(model, name),
        form(1).identity(model, bytes(16)),  # its KV has moved: the model has other weights
    ]
    assert one.namespace not in (name, *(its.namespace for its in others))
    assert form(1).identity(model, name) == one
    assert json.loads(one.attention).keys() == json.loads(model.attention).keys() | {"states"}


# ---------------------------------------------------------------------- pages
def pages(num_layers: int = 3, blocks: int = 7) -> tuple[StatePages, list[list[torch.Tensor]]]:
    """Layers in turn of the first group and of the second; pages with gaps, as vLLM pads them."""
    layers = []
    for index in range(num_layers):
        noise = torch.Generator().manual_seed(index)
        wide = torch.randn((blocks, 4, 3), generator=noise).to(torch.bfloat16)
        layers.append([wide[:, 1:3], torch.randn((blocks, 9), generator=noise)[:, 2:7]])
    return StatePages(form(num_layers=num_layers), layers, [i % 2 for i in range(num_layers)], 0), [
        [one.clone() for one in layer] for layer in layers
    ]


def test_records_hold_each_layers_states_and_go_back_to_other_blocks() -> None:
    source, before = pages()
    out = torch.full((2, source.unit_bytes), 0xEE, dtype=torch.uint8)
    source.read_pages([[3, 5], [1, 2]], out)
    again = torch.empty_like(out)
    source.read_pages([[3, 5], [1, 2]], again)
    assert torch.equal(out, again), "what no tensor fills is always the same"
    source.write_pages([6, 4], out[0])
    for index, layer in enumerate(before):
        put, taken = (6, 4)[index % 2], (3, 5)[index % 2]
        for tensor, old in zip(source._layers[index], layer, strict=True):
            assert torch.equal(tensor[put], old[taken])
            others = [block for block in range(len(old)) if block != put]
            assert torch.equal(tensor[others], old[others])


@pytest.mark.parametrize("blocks", [[0, 1], [1, 7], [-1, 1], [1], [1, 2, 3]])
def test_blocks_that_are_not_there_are_refused(blocks: list[int]) -> None:
    source, before = pages()
    row = torch.zeros(source.unit_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="between 1 and 6 expected"):
        source.write_pages(blocks, row)
    with pytest.raises(ValueError, match="between 1 and 6 expected"):
        source.read_pages([[1, 2], blocks], torch.stack([row, row]))
    for layer, old in zip(source._layers, before, strict=True):
        assert all(map(torch.equal, layer, old))


def test_states_larger_than_the_form_are_refused() -> None:
    with pytest.raises(ValueError, match="states have 1600 bytes"):
        StatePages(form(num_layers=1), [[torch.zeros((3, 400))]], [0], 0)


# ---------------------------------------------------------------------- what is saved and loaded
def tracked(num_tokens: int = 40) -> Tracked:
    ids = list(range(num_tokens))
    request = SimpleNamespace(request_id="r", num_tokens=num_tokens, all_token_ids=ids)
    chains: Any = [KeyChain(bytes(15) + bytes([i]), CHUNK) for i in range(2)]
    groups = (KvGroup(BLOCK, 1),)
    one = Tracked(request, RequestOptions(tag="t"), IDENTITY, chains[0], groups, form(), chains[1])
    one.extend()
    return one


def saved(one: Tracked, places: Mapping[int, Mapping[int, int]]) -> list[SaveJob]:
    return list(one.state_jobs(places))


def test_a_state_at_a_chunks_end_is_saved_under_its_key() -> None:
    one = tracked()
    [job] = saved(one, {16: {0: 11, 2: 12}})
    assert (job.refs, job.blocks) == (one.states.refs(1, 2), [[12, 11]])  # type: ignore[union-attr]
    assert (job.of_states, job.tag, job.namespace) == (True, "t", bytes(15) + b"\1")


@pytest.mark.parametrize(
    "places",
    [
        {12: {0: 1, 2: 2}},  # in the middle of a chunk
        {16: {0: 1}},  # of one group only
        {48: {0: 1, 2: 2}},  # tokens that are not known yet
        {0: {0: 1, 2: 2}},
    ],
)
def test_other_states_are_not_saved(places: dict[int, dict[int, int]]) -> None:
    assert saved(tracked(), places) == []


def test_a_state_that_was_loaded_is_not_saved_again() -> None:
    one = tracked()
    one.promised = (0, 2)
    assert saved(one, {16: {0: 1, 2: 2}}) == []
    assert len(saved(one, {24: {0: 1, 2: 2}})) == 1


def test_a_load_brings_the_state_behind_its_last_chunk() -> None:
    one = tracked()
    tables = [[0, 0, 0, 0, 0, 6, 7], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 8, 9]]
    load = one.state_load(3, tables)
    assert load is not None
    assert (load.blocks, load.ref) == ([8, 6], one.states.refs(2, 3)[0])  # type: ignore[union-attr]
    assert one.chunks_to_load(40) == 4, "the last token is computed"


@pytest.mark.parametrize(
    ("places", "computed", "limit", "stop"),
    [
        ((1, 3, 5, 9), 0, None, 5),
        ((1, 3, 5, 9), 0, 39, 3),
        ((), 0, None, 0),
        ((1, 2), 16, None, 2),  # vLLM has as much itself
        (None, 16, None, 8),
    ],
)
def test_a_load_ends_where_a_state_is(
    places: tuple[int, ...] | None, computed: int, limit: int | None, stop: int
) -> None:
    planner = LoadPlanner(Layout(1, 1, 1, CHUNK, 16), 0, auto=False)
    assert planner.stop([1] * (8 - computed // CHUNK), computed, limit, places) == stop


def planner_of(beside: int, speeds: Mapping[int, float]) -> LoadPlanner:
    """Prefill takes 8 ms a chunk, loading as long as 128 bytes take at these speeds by tier."""
    planner = LoadPlanner(Layout(1, 1, 1, CHUNK, 16), beside, auto=True)
    planner.speeds.saw_prefill(1000, 1.0)
    for tier, bytes_per_s in speeds.items():
        planner.speeds.saw_load(tier, bytes_per_s)
    return planner


@pytest.mark.parametrize(
    ("beside", "tiers", "places", "stop"),
    [
        (0, [1] * 8, (8,), 8),
        (10**7, [1] * 8, (8,), 8),  # 10 ms, which 64 ms of prefill are worth
        (10**7, [1] * 8, (1,), 0),  # 10 ms for 8
        (10**8, [1] * 8, (8,), 0),
        (0, [1] * 7 + [2], (8,), 8),  # slow at the end, but the end is what there is
        (0, [1] * 7 + [2], (6, 8), 6),
    ],
)
def test_a_load_pays_for_its_record_too(
    beside: int, tiers: list[int], places: tuple[int, ...], stop: int
) -> None:
    planner = planner_of(beside, {1: 1e9, 2: 128 / 0.030} if 2 in tiers else {1: 1e9})
    assert planner.stop(tiers, 0, None, places) == stop


def test_a_tier_is_tried_again_though_the_only_place_is_far() -> None:
    planner = planner_of(0, {2: 1000.0})
    stops = [planner.stop([2] * 20, 0, None, (20,)) for _ in range(20)]
    assert 20 in stops


def test_a_state_that_failed_to_load_is_stored_again() -> None:
    one = tracked()
    one.promised = (0, 2)
    one.note_failed_load()
    assert len(saved(one, {16: {0: 1, 2: 2}})) == 1


def test_the_state_is_stored_before_the_kv() -> None:
    one = tracked()
    one.take_blocks([[], list(range(1, 11)), []])
    jobs = list(one.save_jobs(16, 0, {16: {0: 1, 2: 2}}))
    assert [job.of_states for job in jobs] == [True, False]
