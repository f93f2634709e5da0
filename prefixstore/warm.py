"""Warming: documents computed and stored before anybody asks, without a server.

    report = warm("/var/cache/kv", "models/my-model", [Document("faq", text)], preamble="You are")

Each is computed behind the same preamble, by vLLM's offline engine with the connector, so its
chunks have the keys and bytes that serving would give them; and how far its KV moves behind other
documents is measured (`blend.staleness`), which tells blending what to recompute. What is stored
and measured already is left alone, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from prefixstore import config
from prefixstore.config import TAG_BYTES_MAX, parse_bytes
from prefixstore.errors import ConfigError
from prefixstore.namespace import Namespace
from prefixstore.store import Store
from prefixstore.warm_documents import Document
from prefixstore.warm_manifest import Manifest
from prefixstore.warm_plan import Engine, Piece, Text, make_plan
from prefixstore.warm_report import Warmed, WarmReport, notes_on, report_documents
from prefixstore.warm_run import Computer, Labels, Progress, State, Warmer, entry_of, look
from prefixstore.warm_tokens import Tokens

__all__ = ["Document", "Progress", "WarmReport", "Warmed", "warm"]

CHUNK_TOKENS = 64


def warm(
    store: str | os.PathLike[str],
    model: str,
    documents: Iterable[Document],
    *,
    preamble: str | Sequence[int] = "",
    tag: str | None = None,
    ttl_s: float | None = None,
    pin: bool = False,
    engine: Mapping[str, Any] | None = None,
    memory: int | str | None = None,
    disk: int | str | None = None,
    memory_dir: str | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    staleness: bool = True,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> WarmReport:
    """Store the KV of documents. Needs vLLM, which runs in this process.

    ``store`` is a folder, made if it is not there (``memory``, ``disk``, ``memory_dir``: as
    `Store.open`). ``preamble`` stands before each document: text, which gets the model's special
    tokens, or token ids. ``engine``: arguments of vLLM's engine, those of the server. ``tag`` None:
    each document's name. Raises ConfigError and other StoreErrors.
    """
    if tag is not None and len(tag.encode()) > TAG_BYTES_MAX:
        raise ConfigError(f"a tag of {len(tag.encode())} bytes", f"give at most {TAG_BYTES_MAX}")
    if ttl_s is not None and not 0 < ttl_s < config.TTL_S_MAX:
        raise ConfigError(f"ttl_s={ttl_s}", "give seconds above 0 and below 2**31")
    given, folder = dict(engine or {}), Path(store).expanduser().absolute()
    texts, before = _tokenise(model, given, documents, preamble)
    host = _host()
    facts: Engine = host.facts(model, given, chunk_tokens)
    plan = _Plan(str(folder), texts, before, staleness, tag)
    if dry_run and not (folder / config.SETTINGS_FILE).exists():
        sizes = (
            config.DEFAULT_MEMORY_BYTES if memory is None else parse_bytes(memory),
            config.DEFAULT_DISK_BYTES if disk is None else parse_bytes(disk),
        )
        return plan.survey(facts, None, sizes).report(True)
    if dry_run:  # as it is
        memory = disk = memory_dir = None
    with Store.open(folder, memory_bytes=memory, disk_bytes=disk, memory_dir=memory_dir) as opened:
        sizes = opened.settings.memory_bytes, opened.settings.disk_bytes
        known = any(r.identity == facts.identity for r in opened.namespaces())
        namespace = opened.namespace_of(facts.identity.namespace) if known else None
        first = plan.survey(facts, namespace, sizes)
        if dry_run or not first.work:
            return first.report(dry_run)
        final: _Survey | None = None
        try:
            with host.WarmingEngine(model, str(folder), given, chunk_tokens) as running:
                namespace = opened.namespace(running.facts.identity, running.facts.layout)
                final = plan.survey(running.facts, namespace, sizes)
                final.engine_start_s = running.start_s
                final.run(running, Labels(tag, ttl_s, pin), progress)
                return final.report(False)
        finally:
            if final is not None:  # only now: until it ends the engine stores what it has staged
                final.clean_up()


def _host() -> Any:
    try:
        return import_module("connector.warming")
    except ImportError as error:
        raise ConfigError(f"warming needs vLLM: {error}", "install it beside this") from error


def _tokenise(
    model: str,
    engine: Mapping[str, Any],
    documents: Iterable[Document],
    preamble: str | Sequence[int],
) -> tuple[list[Text], list[int]]:
    """The ids of the documents and of the preamble. What has ids already needs no tokenizer."""
    tokenizer = cache(lambda: Tokens(model, engine))
    before = tokenizer().preamble(preamble) if isinstance(preamble, str) else list(preamble)
    texts = [
        Text(d.name, d.tag, tokenizer().document(d.text) if d.ids is None else list(d.ids))
        for d in documents
    ]
    if not texts:
        raise ConfigError("no documents given", "give files, folders, or - for standard input")
    return texts, before


@dataclass(frozen=True)
class _Plan:
    """What is asked for."""

    store: str
    texts: list[Text]
    preamble: list[int]
    staleness: bool
    tag: str | None

    def survey(self, facts: Engine, namespace: Namespace | None, sizes: tuple[int, int]) -> _Survey:
        """What of it is there. ``sizes``: the caps of the tiers."""
        pieces = make_plan(self.texts, self.preamble, facts, sizes[0], staleness=self.staleness)
        return _Survey(self, facts, namespace, sizes, pieces)


class _Survey:
    """What was there, and what is after a run; ``namespace`` None: nothing of this model."""

    def __init__(
        self,
        plan: _Plan,
        facts: Engine,
        namespace: Namespace | None,
        sizes: tuple[int, int],
        pieces: list[Piece],
    ) -> None:
        self._plan, self._facts, self._namespace, self._sizes = plan, facts, namespace, sizes
        self._pieces = pieces
        self._before = self._look()
        self._unmeasured: dict[int, str] = {}
        self._computed_tokens, self._seconds = 0, 0.0
        self._warmer: Warmer | None = None
        self.engine_start_s: float | None = None
        needs = [s.needs(p) for s, p in zip(self._before, pieces, strict=True)]
        self.work = sum(
            compute * len(piece.prompt) + measuring * piece.measuring_tokens
            for piece, (compute, measuring) in zip(pieces, needs, strict=True)
        )

    def _look(self) -> list[State]:
        if self._namespace is None:
            return [State(False, 0, False)] * len(self._pieces)
        return [look(self._namespace, piece) for piece in self._pieces]

    def run(
        self, engine: Computer, labels: Labels, progress: Callable[[Progress], None] | None
    ) -> None:
        """Compute and measure what is missing."""
        assert self._namespace is not None
        began, texts = time.monotonic(), self._plan.texts
        self._warmer = warmer = Warmer(
            self._namespace, engine, texts, self._pieces, labels, self._manifest(), progress
        )
        warmer.run()
        self._unmeasured, self._computed_tokens = warmer.unmeasured, warmer.computed_tokens
        self._seconds = time.monotonic() - began

    def clean_up(self) -> None:
        """Remove what an interrupted run stored only to measure."""
        if self._warmer is not None:
            self._warmer.clean_up()

    def _manifest(self) -> Manifest:
        return Manifest(Path(self._plan.store), self._facts.identity.namespace_hex)

    def _note(self) -> None:
        """See that the manifest has what the store has; another may have stored it."""
        if self._namespace is None:
            return
        manifest = self._manifest()
        known = {entry.key for entry in manifest.read()}
        entries = [
            entry_of(self._namespace, self._plan.texts[piece.document], piece, self._plan.tag)
            for piece in self._pieces
        ]
        manifest.append(entry for entry in entries if entry and entry.key not in known)

    def report(self, dry_run: bool) -> WarmReport:
        """Everything that was found and done."""
        layout, plan = self._facts.layout, self._plan
        after = None if dry_run else self._look()
        documents = report_documents(
            plan.texts, self._pieces, self._before, after, self._unmeasured, layout.payload_bytes
        )
        if not dry_run:
            self._note()
        return WarmReport(
            plan.store, self._facts.model, self._facts.identity.namespace_hex,
            layout.chunk_tokens, layout.payload_bytes, len(plan.preamble), dry_run, documents,
            self.work if dry_run else self._computed_tokens, self._seconds, self.engine_start_s,
            notes_on(self._facts, self._pieces, documents, self._sizes, plan.staleness),
        )  # fmt: skip
