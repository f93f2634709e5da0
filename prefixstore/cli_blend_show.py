"""What ``prefixstore blend-check`` prints for people: progress, a table, a verdict, what now."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prefixstore import cli_show

if TYPE_CHECKING:
    from blend.judge import Figures, Result
    from blend.sample import Sample

_TELL_EVERY_S = 15.0
_FEW_POSITIONS = 100  # below, 3 % of the answers may change and nobody sees it


def progress() -> Callable[[int, int], None]:
    """A bar on a terminal, else a line now and then; with how long it will take."""
    bar = cli_show.progress("compared")
    if bar is not None:
        return bar
    started = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _TELL_EVERY_S:
            told = now
            left = (now - started) / done * (total - done)
            print(f"compared {done} of {total}, about {left:.0f} s left", file=sys.stderr)

    return tell


def checked(result: Result, sample: Sample, kept: Path | None, seconds: float) -> None:
    """The table, the verdict, and what to do next."""
    rows = [_cells(row, result.passes(row)) for row in result.rows]
    if result.floor is not None:
        rounding = _cells(result.floor, True)
        rows.insert(0, [rounding[0], "-", "-", *rounding[3:7], "-"])
    cli_show.table(
        ("selector", "budget", "spent", "KL mean", "KL p95", "same token", "KV error", "close"),
        rows, "lrrrrrrl",
    )  # fmt: skip
    texts = {text for prompt in sample.prompts for text in prompt.texts}
    most = max(len(prompt.texts) for prompt in sample.prompts)
    share = (0.03 * 0.97 / result.positions) ** 0.5
    print(
        f"\n{len(sample.prompts)} prompts of up to {most} texts out of "
        f"{len(texts)}, {result.positions} positions compared with full prefills, "
        f"{seconds:.0f} s.\nKL in nats; around 97 %, `same token` is known to about "
        f"{200 * share:.0f} points. `rounding`: a full prefill in another dtype.\n"
        "`none` reuses texts as they are, `all` recomputes them, `random` is the control."
    )
    if result.positions < _FEW_POSITIONS:
        print("Few positions: ask for more --prompts or --compared to be sure of the verdict.")
    if sample.shared_contexts:
        print("Few texts: staleness was measured behind texts of the same prompts, which flatters "
              "it.\nGive more texts for a fair number.")  # fmt: skip
    verdict = "passed" if result.passed else "failed"
    print(f"\nverdict: {verdict}. {result.reason[:1].upper()}{result.reason[1:]}.")
    if result.passed:
        blend = json.dumps({"selector": result.selector, "budget": result.budget})
        print(f'next: set "blend": {blend} in the engine\'s options')
        if kept is not None:
            print('      (with "blend": true, engines on this store use that by themselves)')
        if "staleness" in result.selector:
            print(
                "      and store your texts with `prefixstore warm`, which measures their staleness"
            )
    else:
        print("next: serve exact prefixes only; or try larger --budgets, or other texts")
        if kept is not None:
            print(
                "      (engines on this store will not blend this model, unless told "
                '"blend": {"ignore_verdict": true})'
            )
    where = f"written to {shlex.quote(str(kept))}" if kept else "not written: no DIR was given"
    print(where)


def _cells(row: Figures, close: bool) -> list[str]:
    return [
        row.selector, f"{row.budget:.0%}", f"{row.charged:.0%}", f"{row.kl_mean:.2g}",
        f"{row.kl_p95:.2g}", f"{row.agreement:.1%}", f"{row.kv_error:.3f}",
        "yes" if close else "no",
    ]  # fmt: skip
