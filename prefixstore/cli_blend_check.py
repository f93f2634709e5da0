"""``prefixstore blend-check``: does blending suit this model and these texts?

Lets `cli_blend_texts` read the user's texts and `blend.check` measure, prints a table and a
verdict, and leaves the verdict in the store's folder, where engines heed it. All that takes torch
or transformers is imported when it runs. An interruption leaves the verdict of before.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixstore import cli_blend_show, cli_blend_texts, verdict
from prefixstore.cli import FAILED, OK
from prefixstore.errors import ConfigError, StoreError
from prefixstore.identity import ModelIdentity, model_folder
from prefixstore.segments import MIN_SEGMENT_TOKENS
from prefixstore.warm_tokens import Tokens

if TYPE_CHECKING:
    from blend.judge import Result
    from blend.sample import Sample


def run_blend_check(args: argparse.Namespace) -> int:
    """Check, print, keep. Raises ConfigError."""
    _check_numbers(args)
    folder = _folder(args)
    given = cli_blend_texts.read(args)
    started = time.monotonic()
    try:
        from torch import OutOfMemoryError

        from blend.errors import BlendError
    except ImportError as error:
        raise _not_installed(error) from error
    try:
        model, tokens = _load(args)
        identity = _identity(args.model, model) if folder is not None else None
        sample = cli_blend_texts.sample(args, tokens, given)
        from blend import check

        result = check.check(
            model, sample, budgets=args.budgets, floor=not args.no_rounding,
            progress=cli_blend_show.progress(),
        )  # fmt: skip
    except BlendError as error:
        raise ConfigError(str(error)) from error
    except OutOfMemoryError as error:
        raise ConfigError(
            "the device has too little memory",
            "try --no-rounding, --dtype bfloat16, or fewer --tokens and --texts-per-prompt",
        ) from error
    made = _verdict(args, result, sample, model)
    kept = None
    if folder is not None and identity is not None:
        kept = verdict.write(folder, identity, made)
    if args.json:
        print(json.dumps(_as_json(result, made, kept)))
    else:
        cli_blend_show.checked(result, sample, kept, time.monotonic() - started)
    return OK if result.passed else FAILED


# ------------------------------------------------------------------ what is asked for
def _check_numbers(args: argparse.Namespace) -> None:
    """Say what is wrong before anything heavy is loaded."""
    least = {
        "prompts": 1, "texts_per_prompt": 2, "tokens": MIN_SEGMENT_TOKENS,
        "compared": 1 if args.requests else 2,
    }  # fmt: skip
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(args, name)}", f"give {smallest} or more")
    for budget in args.budgets:
        if not 0 < budget <= 1:
            raise ConfigError(
                f"a budget of {budget}", "give shares above 0, 1 at most, such as 0.15"
            )


def _folder(args: argparse.Namespace) -> Path | None:
    if args.folder and args.dir:
        raise ConfigError("the folder is given twice", "give DIR or --dir")
    given = args.folder or args.dir
    if not given:
        return None
    folder = verdict.require_store(given)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written", "run as the user who runs the engine")
    return folder


# ------------------------------------------------------------------ the model
def _load(args: argparse.Namespace) -> tuple[Any, Tokens]:
    """The model and its tokenizer. Raises ConfigError."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        from blend import hf
    except ImportError as error:
        raise _not_installed(error) from error
    if os.path.sep in args.model and not Path(args.model).is_dir() and args.model.count("/") != 1:
        raise ConfigError(f"--model {args.model}: there is no such folder")
    transformers_logging.disable_progress_bar()  # standard error has our own
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: there is none that torch can use", "try cpu")
    dtype = args.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"  # what most CPUs compute fastest
    try:
        tokens = Tokens(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        model = model.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"cannot load {args.model}: {first}",
            "give a folder, or the name of a model on the hub, that transformers can load",
        ) from error
    hf.check_model(model)
    return model, tokens


def _identity(name: str, model: Any) -> ModelIdentity:
    dtype = str(model.dtype).removeprefix("torch.")
    return ModelIdentity.from_folder(model_folder(name), model_dtype=dtype)


def _not_installed(error: ImportError) -> StoreError:
    return ConfigError(
        f"blend-check needs torch and transformers: {error}",
        "pip install 'prefixstore[blend]'",
    )


# ------------------------------------------------------------------ what is kept
def _versions() -> dict[str, str]:
    found = {}
    for name in ("prefixstore", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            found[name] = ""
    return found


def _verdict(
    args: argparse.Namespace, result: Result, sample: Sample, model: Any
) -> verdict.Verdict:
    rows = [*([result.floor] if result.floor else []), *result.rows]
    used = {text for prompt in sample.prompts for text in prompt.texts}
    return verdict.Verdict(
        passed=result.passed,
        selector=result.selector,
        budget=result.budget,
        reason=result.reason,
        model=args.model,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        texts={
            "from": [args.requests] if args.requests else list(args.texts),
            "texts": len(used),
            "tokens": max(len(sample.texts[text]) for text in used),
            "prompts": len(sample.prompts),
            "texts_per_prompt": max(len(prompt.texts) for prompt in sample.prompts),
            "positions": result.positions,
            "shared_contexts": sample.shared_contexts,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        figures=[asdict(row) for row in rows],
        versions=_versions(),
    )


def _as_json(result: Result, made: verdict.Verdict, kept: Path | None) -> dict[str, Any]:
    return {
        **asdict(made), "independent": result.independent,
        "written_to": None if kept is None else str(kept),
    }  # fmt: skip
