"""vLLM's groups of KV caches, and which blocks of them make a chunk.

vLLM's hybrid KV cache manager puts layers of one kind in a group with block tables of its own. A
group of layers with a sliding window gives blocks back once no token still to be computed looks at
them, and has block 0 (which no request owns) in their place.

What must hold: a chunk holds all layers' KV of all its tokens, so any engine can load any prefix of
what any other saved. A chunk is saved by the step that completes it. Its tokens' blocks are then
still there in every group whose window is at least a chunk long; shorter windows are refused. Of a
prefix that is loaded, layers with a window get the part that vLLM has given them blocks for.

Pure functions of plain values, so a crash leaves nothing behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NULL_BLOCK = 0  # vLLM's: stands where a group keeps nothing
_KINDS = ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec")
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_DRAFT = "draft_model."

Tables = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class KvGroup:
    """One group: ``index`` is vLLM's number of it, ``block_tokens`` the size of its blocks,
    ``window`` how many tokens its layers look back, the token itself included; None: at all."""

    block_tokens: int
    index: int = 0
    window: int | None = None

    def first_kept(self, computed_tokens: int) -> int:
        """The first token whose block is surely there in a step that begins at that token."""
        return 0 if self.window is None else max(0, computed_tokens - self.window + 1)


def have_windows(groups: Sequence[KvGroup]) -> bool:
    """Whether a load that fails in the middle leaves no prefix that could be used."""
    return any(group.window is not None for group in groups)


def are_all_or_nothing(groups: Sequence[KvGroup], kv_cache_groups: Sequence[Any]) -> bool:
    """Whether a load can only fail as a whole: for windows, and where vLLM has several groups (a
    draft's among them), for then it cannot take the blocks that failed."""
    return have_windows(groups) or len(kv_cache_groups) > 1


def blocks_of_chunks(
    groups: Sequence[KvGroup], tables: Tables, chunk_tokens: int, start: int, stop: int
) -> list[list[int]]:
    """The blocks of chunks ``[start, stop)``: in a row those of the first group, the second, ..."""
    rows: list[list[int]] = [[] for _ in range(start, stop)]
    for group, table in zip(groups, tables, strict=True):
        step = chunk_tokens // group.block_tokens
        for row, chunk in zip(rows, range(start, stop), strict=True):
            row.extend(table[chunk * step : (chunk + 1) * step])
    return rows


def first_savable(groups: Sequence[KvGroup], chunk_tokens: int, step_start: int) -> int:
    """The first chunk that a step beginning at that token can still read in every group."""
    return max(-(-group.first_kept(step_start) // chunk_tokens) for group in groups)


def layer_number(name: str) -> int | None:
    """Which layer of a model an attention layer of this name belongs to; None if it does not say.

    A draft model's layers are numbered from 0 or on from those of the model it drafts for.
    """
    match = _LAYER_NUMBER.search(f".{name}.")
    return None if match is None else int(match[1])


def without_drafts(names: Iterable[str], num_layers: int | None) -> list[str]:
    """The layers of the model itself; ``num_layers`` is None where there is no draft model.

    A draft model's KV is not kept: it decides how often a guess is right, never what is answered,
    and other engines that share the store may draft with another model or with none.
    """
    return [
        name
        for name in names
        if num_layers is None
        or (not name.startswith(_DRAFT) and (layer_number(name) or 0) < num_layers)
    ]


def groups_of(kv_cache_groups: Sequence[Any], num_layers: int | None) -> list[tuple[KvGroup, Any]]:
    """The groups with layers of the model itself, and what vLLM says of each (its spec).

    ``num_layers``: see `without_drafts`. A pipeline stage may have no layer of a group; it counts
    all the same, so that all ranks and the scheduler have the same list. So does what is not
    attention: a model may number its Mamba layers behind its attention (Falcon-H1 does), and to
    take them for a draft's would be to forget their state.
    """
    return [
        (
            KvGroup(
                int(group.kv_cache_spec.block_size),
                index,
                _window(group.kv_cache_spec),
            ),
            group.kv_cache_spec,
        )
        for index, group in enumerate(kv_cache_groups)
        if not group.layer_names
        or type(group.kv_cache_spec).__name__ not in _KINDS
        or without_drafts(group.layer_names, num_layers)
    ]


def _window(spec: Any) -> int | None:
    return int(spec.sliding_window) if type(spec).__name__ == "SlidingWindowSpec" else None


def num_planes(spec: Any) -> int:
    """Planes of a layer's KV: see `page_probe.num_planes`."""
    return 1 if type(spec).__name__ == "MLAAttentionSpec" else 2


def refusal(groups: Sequence[tuple[KvGroup, Any]], chunk_tokens: int) -> str:
    """Why KV of these groups cannot be kept in chunks of that size; "" when it can."""
    for group, spec in groups:
        if type(spec).__name__ not in _KINDS:
            return f"KV caches of kind {type(spec).__name__}"
        if getattr(spec, "non_causal", False):
            return "attention that is not causal: KV of a prefix depends on what follows"
        if group.window is not None and group.window < chunk_tokens:
            return (
                f"a sliding window of {group.window} tokens, shorter than a chunk of "
                f"{chunk_tokens}: vLLM gives its blocks back before the chunk is complete; set "
                f"chunk_tokens and the block size to at most {group.window}"
            )
    forms = {
        (num_planes(spec), int(spec.num_kv_heads), int(spec.head_size), str(spec.dtype))
        for _, spec in groups
    }
    if len(forms) != 1:
        return f"layers with different KV (planes, heads, head size, dtype): {sorted(forms)}"
    return ""
