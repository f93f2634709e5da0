"""From figures to a verdict: what counts as faithful enough, and why.

A blend passes when both hold:

* The most likely next token is the full prefill's at MIN_AGREEMENT of the positions or more (or, if
  rounding alone already changes many, it changes no more than FLOOR_SLACK times as many). 97 % is
  what weights of 6 bits keep of an 8B model's; those of 4 bits keep about 90 %.
* The mean KL is at most KL_SMALL: what weights of 5 bits do to Llama 3 8B (llama.cpp's pull request
  6936: 0.0108 nats for q5_K_M, 0.0055 for q6_K), which many people serve unasked; or at most
  FLOOR_SLACK times what rounding does; or at most KL_LEFT of what position-only reuse does. The
  last is for texts that lean on each other hard, where a few positions out of hundreds carry all of
  the KL: there the agreement decides, and KL only has to say that the blend did the work.

Of what passes, the smallest budget is recommended: `DEFAULT` if it is among those, since it costs
nothing at serving time, else the selector with the smallest KL. `random` is the control and never
recommended. Pure functions of numbers: no model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blend.select import DEFAULT

MIN_AGREEMENT = 0.97
KL_SMALL = 0.01  # nats
KL_LEFT = 0.2  # of position-only reuse's
FLOOR_SLACK = 2.0
CONTROLS = ("none", "all", "random")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one selector and budget, over all positions that were compared.

    KL(full || blended) in nats; ``agreement``: share of positions with the same most likely token;
    ``kv_error``: of K and V of the moved tokens at the last layers, |blended - full| / |full|;
    ``charged``: share of the work of recomputing all moved tokens that was spent.
    """

    selector: str
    budget: float
    charged: float
    kl_mean: float
    kl_p95: float
    agreement: float
    kv_error: float


@dataclass(frozen=True, slots=True)
class Result:
    """``rows`` with `none` and `all` first; ``floor``: what rounding alone does, if measured.

    ``selector`` and ``budget`` are the recommendation; "" and 0 when nothing passed.
    ``independent``: reusing the texts as they are passes too.
    """

    rows: list[Figures]
    floor: Figures | None
    positions: int
    passed: bool
    selector: str
    budget: float
    reason: str
    independent: bool = False

    def row(self, selector: str, budget: float) -> Figures:
        """The figures of one combination. Raises KeyError."""
        for row in self.rows:
            if (row.selector, row.budget) == (selector, budget):
                return row
        raise KeyError((selector, budget))

    def passes(self, row: Figures) -> bool:
        """Whether a row is faithful enough."""
        return faithful(row, self.row("none", 0.0), self.floor)


def faithful(row: Figures, none: Figures, floor: Figures | None) -> bool:
    """See the module docstring; ``none`` is position-only reuse."""
    rounding_kl = floor.kl_mean if floor else 0.0
    rounding_changes = 1 - floor.agreement if floor else 0.0
    changes = max(1 - MIN_AGREEMENT, FLOOR_SLACK * rounding_changes)
    kl = max(KL_SMALL, FLOOR_SLACK * rounding_kl, KL_LEFT * none.kl_mean)
    return 1 - row.agreement <= changes + 1e-12 and row.kl_mean <= kl


def judge(rows: Sequence[Figures], floor: Figures | None, positions: int) -> Result:
    """The verdict. ``rows`` must hold `none` at 0 and `all` at 1."""
    none = next(row for row in rows if row.selector == "none")
    everything = next(row for row in rows if row.selector == "all")

    def result(row: Figures | None, reason: str, independent: bool = False) -> Result:
        chosen = (False, "", 0.0) if row is None else (True, row.selector, row.budget)
        return Result(list(rows), floor, positions, *chosen, reason, independent)

    # Against itself as "position-only", so that the share of its KL cannot excuse it.
    strict = Figures("none", 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if not faithful(everything, strict, floor):
        return result(
            None,
            "even with every token recomputed the answer is not the full prefill's "
            f"({_told(everything)}): this model cannot be blended",
        )
    choices = [row for row in rows if row.selector not in CONTROLS]
    passed = [row for row in choices if faithful(row, none, floor)]
    independent = faithful(none, strict, floor)
    if not passed and not independent:
        best = min(choices, key=lambda row: row.kl_mean, default=none)
        return result(
            None,
            f"no selector stays close to the full prefill at any budget tried; best is "
            f"{best.selector} at {100 * best.budget:.0f} % ({_told(best)})",
        )
    chosen = min(
        passed, key=lambda row: (row.budget, row.selector != DEFAULT, row.kl_mean), default=none
    )
    if independent:
        return result(
            chosen,
            "these texts hardly depend on each other: reusing them as they are is as good "
            f"({_told(none)}); the smallest budget is a safeguard for texts that do",
            independent=True,
        )
    return result(
        chosen,
        f"{chosen.selector} at {100 * chosen.budget:.0f} % stays close to the full prefill "
        f"({_told(chosen)}; reused as they are: {_told(none)})",
    )


def _told(row: Figures) -> str:
    return f"KL {row.kl_mean:.2g} nats, same next token at {100 * row.agreement:.1f} %"
