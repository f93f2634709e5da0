"""``prefixstore match``: what of a prompt is stored, and what the rest would cost."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prefixstore.cli import OK
from prefixstore.cli_show import table
from prefixstore.config import format_bytes

if TYPE_CHECKING:
    from prefixstore.warm_match import MatchReport, Part

_SHOWN_PARTS = 100


def run_match(args: argparse.Namespace) -> int:
    """Show what of a prompt is stored."""
    from prefixstore.client.token import token_of
    from prefixstore.identity import ModelIdentity, model_folder
    from prefixstore.urls import SERVER_SCHEMES
    from prefixstore.warm_address import Address
    from prefixstore.warm_manifest import Manifest
    from prefixstore.warm_match import choose_namespace, match_prompt
    from prefixstore.warm_store import open_target
    from prefixstore.warm_tokens import Tokens

    of_server = args.store.partition(":")[0] in SERVER_SCHEMES  # a pool has passwords of its own
    token = token_of(None) if of_server else ""
    address = Address.parse(args.store, args.token_file, args.ca_file, token=token)
    with open_target(address, create=False) as target:
        model = ModelIdentity.from_folder(model_folder(args.model))
        logging.getLogger("transformers").setLevel(logging.ERROR)
        tokens = Tokens(args.model).prompt(args.prompt)
        chosen = choose_namespace(target, model, tokens, args.namespace or "", args.codec)
        names = None if args.manifest is None else Manifest(Path(args.manifest))
        report = match_prompt(target, chosen, tokens, args.budget, names)
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
        "-" if part.alone is None else "yes" if part.alone else "no",
        "-" if part.kind == "exact" else measured,
    ]


def _place(offset: int | None) -> str:
    if offset is None:
        return "-"
    return str(offset) if offset >= 0 else "preamble"
