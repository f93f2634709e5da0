"""What is measured of a blended batch, how batches become rows, and the bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cases import Case, load, make_case
from benchmarks.table import Bar
from blend import reference
from blend.reference import KeyValues
from blend.select import DEFAULT, SELECTORS

Rows = list[dict[str, object]]
BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.36, 0.5)
BAR_BUDGETS = (0.2, 0.36)
RIVALS = ("random", "first", "deviation", "query")
COMPARED = ("staleness", "staleness-query", *RIVALS, "oracle")
FREE = "{} (choice free)"
BARS_AT_20 = {"A": 0.95, "B": 0.90, "C": 0.80}
BAR_AT_36 = 0.95
BAR_CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Score:
    """Of one batch, for one selector and budget; counts are of queries."""

    selector: str
    budget: float
    charged: float
    cross_right: int
    cross: int
    intra_right: int
    intra: int
    agree: float
    kl: float
    deviation: tuple[float, ...]  # a layer: |K - K full| and |V - V full| over their sizes


def measure(model: Any, case: Case, budgets: Sequence[float] = BUDGETS) -> list[Score]:
    """All selectors at all budgets; first ``none`` and ``all``, between which PGR is counted."""
    wanted = [("none", 0.0, False), ("all", 1.0, False)]
    for name in COMPARED:
        wanted += [(name, budget, False) for budget in budgets]
        if SELECTORS[name].needs.value in ("deviation", "query"):
            wanted += [(name, budget, True) for budget in budgets]
    return [score for each in wanted if (score := _score(model, case, *each)) is not None]


def _score(model: Any, case: Case, name: str, budget: float, free: bool) -> Score | None:
    layers = model.config.num_hidden_layers
    candidates = int(case.reused.candidates.sum())
    if not free:  # what the choice costs alone
        least = SELECTORS[name].full_layers / layers
        if SELECTORS[name].needs.value == "query":
            least = int(case.reused.fresh.sum()) / candidates
        if least > budget:
            return None
    found = reference.blend(model, case.reused, name, budget, free_choice=free)
    blended = found.trace.logits[:, case.answer_positions].float()
    full = case.full.logits[:, case.answer_positions].float()
    right = blended.argmax(-1) == case.answers
    intra = case.asked & ~case.cross
    return Score(
        selector=FREE.format(name) if free else name,
        budget=budget,
        charged=found.charged,
        cross_right=int((right & case.cross).sum()),
        cross=int(case.cross.sum()),
        intra_right=int((right & intra).sum()),
        intra=int(intra.sum()),
        agree=float((blended.argmax(-1) == full.argmax(-1))[case.asked].float().mean()),
        kl=float(divergence(full, blended)[case.asked].mean()),
        deviation=_deviation(found.trace.key_values, case.full.key_values, case.reused.candidates),
    )


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) in nats over the last dimension of two tensors of logits.

    In float64: of two sure answers it is smaller than float32 can tell from 0.
    """
    expected, found = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def _deviation(found: KeyValues, full: KeyValues, where: Tensor) -> tuple[float, ...]:
    result = []
    for pair, truth in zip(found, full, strict=True):
        shares = [
            float((one[:, :, where] - two[:, :, where]).norm() / two[:, :, where].norm())
            for one, two in zip(pair, truth, strict=True)
        ]
        result.append(sum(shares) / 2)
    return tuple(result)


def summary(model: str, family: str, chunks: int, batches: list[list[Score]]) -> Rows:
    """One row for each selector and budget, over all batches."""
    groups: dict[tuple[str, float], list[Score]] = {}
    for score in (score for batch in batches for score in batch):
        groups.setdefault((score.selector, score.budget), []).append(score)

    def accuracy(scores: Iterable[Score], kind: str) -> float | None:
        right = sum(getattr(score, f"{kind}_right") for score in scores)
        asked = sum(getattr(score, kind) for score in scores)
        return right / asked if asked else None

    reuse = accuracy(groups["none", 0.0], "cross")
    full = accuracy(groups["all", 1.0], "cross")
    rows: Rows = []
    for (selector, budget), scores in groups.items():
        cross = accuracy(scores, "cross")
        pgr: float | None = None
        if cross is not None and reuse is not None and full is not None and full > reuse:
            pgr = (cross - reuse) / (full - reuse)
        rows.append({
            "model": model, "family": family, "chunks": chunks,
            "selector": selector, "budget": budget,
            "charged": fmean(score.charged for score in scores),
            "cross": cross, "intra": accuracy(scores, "intra"),
            "pgr": pgr,
            "agree": fmean(score.agree for score in scores),
            "kl": fmean(score.kl for score in scores),
            "kv_deviation": " ".join(
                f"{fmean(layer):.3f}"
                for layer in zip(*(score.deviation for score in scores), strict=True)
            ),
        })  # fmt: skip
    return rows


@torch.inference_mode()
def noise_row(folder: Path, device: str, prompts: int) -> dict[str, object]:
    """A full prefill in bfloat16 beside the same one in float32: what rounding alone does.

    Not two prefills in bfloat16 that are cut at different places: the reference's kernels may give
    them bit for bit the same (they do on an H200), and then no floor would be seen.
    """
    case = make_case(load(folder, device), "B", BAR_CHUNKS, prompts, 0, 16)
    rounded = reference.forward(load(folder, device, torch.bfloat16), case.reused.ids)
    one, two = (trace.logits[:, case.answer_positions].float() for trace in (case.full, rounded))
    right = two.argmax(-1) == case.answers
    return {
        "model": folder.name, "family": "B", "chunks": BAR_CHUNKS, "selector": "full, bf16 noise",
        "budget": 1.0, "charged": 1.0, "cross": float(right[case.cross].float().mean()),
        "intra": float(right[case.asked & ~case.cross].float().mean()), "pgr": None,
        "agree": float((one.argmax(-1) == two.argmax(-1))[case.asked].float().mean()),
        "kl": float(divergence(one, two)[case.asked].mean()),
        "kv_deviation": " ".join(
            f"{layer:.3f}"
            for layer in _deviation(
                rounded.key_values, case.full.key_values, case.reused.candidates
            )
        ),
    }  # fmt: skip


def bars(rows: Rows) -> list[Bar]:
    """What the shipped selector must reach, on each model, with BAR_CHUNKS chunks."""
    made: list[Bar] = []
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        mine = [row for row in rows if row["model"] == model and row["chunks"] == BAR_CHUNKS]
        table = {(row["family"], row["selector"], row["budget"]): row for row in mine}

        def pgr(family: str, selector: str, budget: float, table: Mapping[Any, Any] = table) -> Any:
            return table.get((family, selector, budget), {}).get("pgr")

        for family, limit in BARS_AT_20.items():
            found = pgr(family, DEFAULT, 0.2)
            made.append(Bar(f"{model}: PGR of {DEFAULT} at 20 %, {family}", found, limit, ">="))
        for family in BARS_AT_20:
            found = pgr(family, DEFAULT, 0.36)
            made.append(Bar(f"{model}: PGR of {DEFAULT} at 36 %, {family}", found, BAR_AT_36, ">="))
        lost = _lost_on_e(table)
        made.append(Bar(f"{model}: answers lost on E at 20 %", lost, 0.0, "<="))
        for budget in BAR_BUDGETS:
            ours = _mean(pgr(family, DEFAULT, budget) for family in BARS_AT_20)
            for rival in RIVALS:
                # One that cannot pay for its choice recomputes nothing: PGR 0.
                theirs = _mean(pgr(family, rival, budget) or 0.0 for family in BARS_AT_20)
                ahead = None if ours is None or theirs is None else ours - theirs
                name = f"{model}: mean PGR ahead of {rival} at {100 * budget:.0f} %"
                made.append(Bar(name, ahead, 0.0, ">"))
    return made


def _lost_on_e(table: Mapping[Any, Any]) -> float | None:
    ours, full = table.get(("E", DEFAULT, 0.2)), table.get(("E", "all", 1.0))
    return float(full["intra"] - ours["intra"]) if ours and full else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None
