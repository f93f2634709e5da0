"""``prefixstore match``: what of a prompt is stored, and what the rest would cost."""

from __future__ import annotations

import argparse
import json
import logging
from typing import TYPE_CHECKING

from prefixstore.cli import OK
from prefixstore.cli_show import table
from prefixstore.config import format_bytes

if TYPE_CHECKING:
    from prefixstore.warm_match import MatchReport, Part

_SHOWN_PARTS = 100


def run_match(args: argparse.Namespace) -> int:
    """Show what of a prompt is stored."""
    from prefixstore.identity import ModelIdentity, model_folder
    from prefixstore.store import Store
    from prefixstore.warm_match import choose_namespace, match_prompt
    from prefixstore.warm_tokens import Tokens

    with Store.open(args.folder, create=False) as store:
        model = ModelIdentity.from_folder(model_folder(args.model))
        record = choose_namespace(store, model, args.namespace or "")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        report = match_prompt(store, record, Tokens(args.model).prompt(args.prompt), args.budget)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        show(report)
    return OK


def show(report: MatchReport) -> None:
    """The result, for people."""
    print(f"namespace {report.namespace[:12]}, {report.model}, KV in {report.kv_dtype}\n")
    rows = [_row(part) for part in report.parts[:_SHOWN_PARTS]]
    table(
        ("tokens", "count", "", "document", "at", "tiers", "alone", "staleness"), rows, "rrllrlll"
    )
    if len(report.parts) > len(rows):
        print(f"... and {len(report.parts) - len(rows)} more parts (--json has all)")
    print(
        f"\n{report.tokens} tokens: {report.exact_tokens} from the exact prefix, "
        f"{report.segment_tokens} from elsewhere, {report.new_tokens} new"
    )
    exact = report.computed_tokens_exact
    print(f"cost without blending: {exact} tokens computed ({exact / report.tokens:.1%})")
    print(
        f"cost with blending at {report.budget:g}: {report.computed_tokens:.0f} tokens computed "
        f"({report.computed_share:.1%}), {format_bytes(report.load_bytes)} loaded"
    )


def _row(part: Part) -> list[str]:
    where, count = f"{part.start}-{part.start + part.tokens - 1}", str(part.tokens)
    if part.tiers is None:
        return [where, count, part.kind, "", "", "", "", ""]
    measured = f"{part.measured_chunks} of {part.chunks} chunks"
    if part.measured_chunks in (0, part.chunks):
        measured = "measured" if part.measured_chunks else "not measured"
    return [
        where,
        count,
        part.kind,
        part.source or "-",
        _place(part.source_offset),
        "+".join(part.tiers),
        "yes" if part.alone else "no",
        "-" if part.kind == "exact" else measured,
    ]


def _place(offset: int | None) -> str:
    if offset is None:
        return "-"
    return str(offset) if offset >= 0 else "preamble"
