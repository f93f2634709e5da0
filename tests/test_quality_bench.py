"""The quality benchmark's cases and sums, on a tiny model with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import cases, codecs, measure
from benchmarks.quality.csmqar import VOCABULARY, Spec
from benchmarks.table import Bar
from blend import hf, reference
from blend.rope import Rope

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=8,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    made = transformers.LlamaForCausalLM(config)
    for weight in made.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, 0, 0.4)
    made.save_pretrained(folder)
    return cases.load(folder, "cpu")


@pytest.fixture(scope="module")
def case(model: Any) -> cases.Case:
    return cases.make_case(model, "B", 3, 2, seed=0, queries=4)


def test_a_case_is_what_encoding_and_moving_gives(model: Any, case: cases.Case) -> None:
    """K, V and staleness of a chunk against `blend.hf`, which encodes it alone and rotates it."""
    length = Spec(family="B", chunks=3).chunk_tokens
    here = slice(1 + 2 * length, 1 + 3 * length)
    ids, bos = case.reused.ids[0, here], case.reused.ids[0, :1]
    contexts = [each[0] for each in cases.make_contexts(Spec(family="B", chunks=3), 2, 1000)]
    assert all(len(each) == 4 * length for each in contexts)
    source = hf.measure_staleness(model, hf.encode(model, ids, bos), contexts, bos)
    assert source.staleness is not None
    host = hf.HuggingFaceHost(model, case.reused.ids[0])
    rope = Rope.from_config(hf.check_model(model).to_dict())
    host.place(rope, hf.Placed(source, here.start))
    for index, (key, value) in enumerate(case.reused.cached):
        torch.testing.assert_close(host.keys[index, :, here], key[0, :, here], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            host.values[index, :, here], value[0, :, here], rtol=0, atol=1e-4
        )
    torch.testing.assert_close(
        case.reused.staleness[0, here], source.staleness, rtol=1e-3, atol=1e-4
    )


def test_only_what_is_reused_is_a_candidate(case: cases.Case) -> None:
    length = Spec(family="B", chunks=3).chunk_tokens
    assert case.reused.candidates.nonzero().flatten().tolist() == list(
        range(1 + length, 1 + 3 * length)
    )
    assert int(case.reused.fresh.sum()) == 4 * 4
    assert not bool((case.reused.fresh & case.reused.candidates).any())


def test_the_ends_are_a_full_prefill_and_plain_reuse(model: Any, case: cases.Case) -> None:
    scores = {(s.selector, s.budget): s for s in measure.measure(model, case, (0.3,))}
    whole, nothing = scores["all", 1.0], scores["none", 0.0]
    assert (whole.agree, whole.charged) == (1.0, 1.0)
    assert whole.kl == pytest.approx(0.0, abs=1e-6)
    assert max(whole.deviation) < 1e-5
    assert nothing.charged == 0.0
    assert nothing.deviation[0] < 1e-6  # K and V of the first layer depend on the token alone
    assert min(nothing.deviation[1:]) > 0.01
    assert scores["oracle", 0.3].charged == pytest.approx(0.3, abs=1 / 128)
    assert ("deviation", 0.3) in scores
    assert measure.FREE.format("deviation") in {name for name, _ in scores}


def test_what_a_choice_cannot_pay_for_is_left_out(model: Any, case: cases.Case) -> None:
    names = {s.selector for s in measure.measure(model, case, (0.05,))}
    assert "deviation" not in names  # 2 of 8 layers are 25 %
    assert "query" not in names  # 16 of 256 tokens are 6 %
    assert {"staleness", "first", "random"} <= names


def row(model: str, family: str, selector: str, budget: float, pgr: float | None) -> Any:
    return {
        "model": model, "family": family, "chunks": measure.BAR_CHUNKS, "selector": selector,
        "budget": budget, "charged": budget, "cross": 0.5, "intra": 1.0, "pgr": pgr,
        "agree": 1.0, "kl": 0.0, "kv_deviation": "",
    }  # fmt: skip


def test_bars_read_the_rows_they_name() -> None:
    rows = []
    for family in "ABC":
        for budget in (0.2, 0.36):
            rows.append(row("m", family, "staleness", budget, 0.97))
            rows.append(row("m", family, "first", budget, 0.5))
            rows.append(row("m", family, "random", budget, 0.2))
            rows.append(row("m", family, "query", budget, 0.98))
    rows += [row("m", "E", "staleness", 0.2, None), row("m", "E", "all", 1.0, None)]
    found: dict[str, Bar] = {bar.name: bar for bar in measure.bars(rows)}
    assert found["m: PGR of staleness at 20 %, B"].value == 0.97
    assert found["m: answers lost on E at 20 %"].value == 0.0
    short = [bar.name for bar in found.values() if not bar.ok]
    assert short == [f"m: mean PGR ahead of query at {share} %" for share in (20, 36)]
    ahead = found["m: mean PGR ahead of deviation at 20 %"].value  # which could not pay: 0
    assert ahead == pytest.approx(0.97)
    assert all(not bar.ok for bar in measure.bars([row("m", "A", "first", 0.2, 1.0)]))


def test_pgr_is_between_the_ends(model: Any, case: cases.Case) -> None:
    rows = measure.summary("m", "B", 3, [measure.measure(model, case, (0.2,))])
    ends = {row["selector"]: row for row in rows}
    if ends["all"]["cross"] != ends["none"]["cross"]:
        assert (ends["none"]["pgr"], ends["all"]["pgr"]) == (0.0, 1.0)
    json.dumps(rows)


def test_a_missing_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.quality import __main__ as quality

    monkeypatch.setattr(quality, "MODELS", tmp_path)
    with pytest.raises(SystemExit, match="train one"):
        quality.main(["--quick"])


def test_kv_that_went_through_a_codec(model: Any) -> None:
    """Whole chunks are what torch's rounding leaves of them, the rest is as it was; a lossy codec
    is off by more, in all of them."""
    _, _, ids = codecs.make_prompts("B", 2, 0, 2)
    exact = reference.forward(model, ids[:, :200]).key_values
    rounded, tokens = codecs.coded(exact, codecs.FLOOR)
    assert tokens == 192
    for pair, truth in zip(rounded, exact, strict=True):
        for one, two in zip(pair, truth, strict=True):
            assert torch.equal(one[:, :, :tokens], two[:, :, :tokens].bfloat16().float())
            assert torch.equal(one[:, :, tokens:], two[:, :, tokens:])
    for name in ("fp8", "int8"):
        found, _ = codecs.coded(exact, name)
        for pair, truth in zip(found, exact, strict=True):
            for one, two in zip(pair, truth, strict=True):
                wrong = (one - two)[:, :, :tokens].unflatten(2, (3, 64)).norm(dim=(3, 4))
                size = two[:, :, :tokens].unflatten(2, (3, 64)).norm(dim=(3, 4))
                assert ((wrong > 0.002 * size) & (wrong < 0.05 * size)).all()


def test_answers_behind_codecs(model: Any) -> None:
    batches = [list(codecs.measure(model, "B", 2, seed, 2)) for seed in range(2)]
    rows = codecs.rows_of("tiny", "B", batches)
    assert [row["codec"] for row in rows] == ["bfloat16", "fp8", "int8"]
    kl = [float(str(row["kl_all"])) for row in rows]
    assert 0 < kl[0] < kl[2] < kl[1]
    assert all(float(str(row["error_k"])) > 0 for row in rows)
    good, *_ = codecs.bars_of([{**rows[1], "kl": 0.009, "right": 0.5, "right_exact": 0.5}])
    bad = codecs.bars_of([{**rows[1], "kl": 0.02, "right": 0.4, "right_exact": 0.5}])
    assert good.ok
    assert not any(one.ok for one in bad)
