"""Warming: documents computed and stored before anybody asks, without a server.

    report = warm("/var/cache/kv", "models/my-model", [Document("faq", text)], preamble="You are")

The store is a folder, or a server (``warm("https://host:7575", ..., token_file="token")``). Each
document is computed behind the same preamble, by vLLM's offline engine with the connector, so its
chunks have the keys and bytes that serving would give them; and how far its KV moves behind other
documents is measured (`blend.staleness`), which tells blending what to recompute. What is stored
and measured already is left alone, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import logging
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
from prefixstore.errors import ConfigError, RemoteError, StoreError
from prefixstore.interface import NamespaceLike
from prefixstore.warm_address import Address
from prefixstore.warm_documents import Document
from prefixstore.warm_held import Held, State
from prefixstore.warm_manifest import Manifest
from prefixstore.warm_plan import Engine, Piece, Text, make_plan
from prefixstore.warm_report import Warmed, WarmReport, notes_on, report_documents
from prefixstore.warm_run import Computer, Labels, Progress, Warmer
from prefixstore.warm_store import Target, known, open_target
from prefixstore.warm_tokens import Tokens

__all__ = ["Document", "Progress", "WarmReport", "Warmed", "warm"]

logger = logging.getLogger("prefixstore")

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
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    codec: str = "none",
    manifest: str | os.PathLike[str] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    staleness: bool = True,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> WarmReport:
    """Store the KV of documents. Needs vLLM, which runs in this process.

    ``store`` is a folder, made if it is not there (``memory``, ``disk``, ``memory_dir``: as
    `Store.open`), or the URL of a server (``token_file``, ``ca_file``), which is asked before
    anything takes long; ``codec`` is that of the engines that are to find it. ``manifest``: a file
    for the names of what is warmed; a folder has its own. ``preamble`` stands before each document:
    text, which gets the model's special tokens, or token ids. ``engine``: arguments of vLLM's
    engine, those of the server. ``tag`` None: each document's name. Raises ConfigError and other
    StoreErrors.
    """
    if tag is not None and len(tag.encode()) > TAG_BYTES_MAX:
        raise ConfigError(f"a tag of {len(tag.encode())} bytes", f"give at most {TAG_BYTES_MAX}")
    if ttl_s is not None and not 0 < ttl_s < config.TTL_S_MAX:
        raise ConfigError(f"ttl_s={ttl_s}", "give seconds above 0 and below 2**31")
    address = Address.parse(store, token_file, ca_file, codec)
    tiers: dict[str, Any] = {"memory": memory, "disk": disk, "memory_dir": memory_dir}
    names = None if manifest is None else Manifest(Path(manifest))
    if names is not None:
        names.check()
    if address.folder is None:
        open_target(address, **tiers, writing=not dry_run).close()
    given = dict(engine or {})
    texts, before = _tokenise(model, given, documents, preamble)
    host = _host()
    facts: Engine = host.facts(model, given, chunk_tokens, address.codec)
    plan = _Plan(address, texts, before, staleness, tag, names)
    if dry_run and address.folder is not None:
        if not (address.folder / config.SETTINGS_FILE).exists():
            sizes = (
                config.DEFAULT_MEMORY_BYTES if memory is None else parse_bytes(memory),
                config.DEFAULT_DISK_BYTES if disk is None else parse_bytes(disk),
            )
            return plan.survey(facts, None, sizes).report(True)
        tiers = {}  # as it is
    with open_target(address, **tiers, writing=not dry_run) as target:
        if not target.knows_disk:
            target.written(config.OP_DEADLINE_S)  # what a run stored that was killed just now
        found = known(target, facts.identity)
        held = None if found is None else Held(target, found)
        first = plan.survey(facts, held, target.sizes)
        if dry_run or not first.work:
            return first.report(dry_run)
        return _run(plan, target, host, (model, given, chunk_tokens), Labels(tag, ttl_s, pin),
                    progress)  # fmt: skip


def _run(
    plan: _Plan,
    target: Target,
    host: Any,
    of: tuple[str, Mapping[str, Any], int],
    labels: Labels,
    progress: Callable[[Progress], None] | None,
) -> WarmReport:
    """Start the engine and do what is missing. ``of``: model, arguments, tokens of a chunk."""
    model, arguments, chunk_tokens = of
    final: _Survey | None = None
    options = plan.address.engine_options
    try:
        with host.WarmingEngine(model, options, arguments, chunk_tokens) as running:
            namespace = target.store.namespace(running.facts.identity, running.facts.layout)
            final = plan.survey(running.facts, Held(target, namespace), target.sizes)
            final.engine_start_s = running.start_s
            final.run(running, labels, progress)
            return final.report(False)
    except RemoteError as error:
        raise RemoteError(str(error), "what is stored stays; run again to go on") from error
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
        raise ConfigError(
            "no documents", "give files that hold some, folders, or - for standard input"
        )
    return texts, before


@dataclass(frozen=True)
class _Plan:
    """What is asked for."""

    address: Address
    texts: list[Text]
    preamble: list[int]
    staleness: bool
    tag: str | None
    names: Manifest | None  # None: what the folder has, if it is one

    def survey(self, facts: Engine, held: Held | None, sizes: tuple[int, int] | None) -> _Survey:
        """What of it is there. ``sizes``: the caps of the tiers, None if they are not known."""
        memory_bytes = None if sizes is None else sizes[0]
        pieces = make_plan(self.texts, self.preamble, facts, memory_bytes, staleness=self.staleness)
        return _Survey(self, facts, held, sizes, pieces)

    def manifest(self, namespace: NamespaceLike) -> Manifest | None:
        """Where the names of what is in a namespace are noted."""
        if self.names is not None or self.address.folder is None:
            return self.names
        return Manifest.of(self.address.folder, namespace.name)


class _Survey:
    """What was there, and what is after a run; ``held`` None: nothing of this model."""

    def __init__(
        self,
        plan: _Plan,
        facts: Engine,
        held: Held | None,
        sizes: tuple[int, int] | None,
        pieces: list[Piece],
    ) -> None:
        self._plan, self._facts, self._held, self._sizes = plan, facts, held, sizes
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
        if self._held is None:
            return [State(False, 0, False)] * len(self._pieces)
        return [self._held.look(piece) for piece in self._pieces]

    def run(
        self, engine: Computer, labels: Labels, progress: Callable[[Progress], None] | None
    ) -> None:
        """Compute and measure what is missing. Raises StoreError."""
        assert self._held is not None
        began, plan = time.monotonic(), self._plan
        manifest = plan.manifest(self._held.namespace)
        self._warmer = warmer = Warmer(
            self._held, engine, plan.texts, self._pieces, labels, manifest, progress
        )
        warmer.run()
        self._unmeasured, self._computed_tokens = warmer.unmeasured, warmer.computed_tokens
        self._seconds = time.monotonic() - began

    def clean_up(self) -> None:
        """Remove what an interrupted run stored only to measure."""
        if self._warmer is None:
            return
        try:
            self._warmer.clean_up()
        except StoreError as error:  # why it was interrupted is the better message
            logger.info("prefixstore: what was stored to measure expires by itself: %s", error)

    def _note(self) -> None:
        """See that the manifest has what the store has; another may have stored it."""
        manifest = None if self._held is None else self._plan.manifest(self._held.namespace)
        if self._held is None or manifest is None:
            return
        known = {entry.key for entry in manifest.read()}
        entries = [
            self._held.entry(self._plan.texts[piece.document], piece, self._plan.tag)
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
        if self._held is not None:
            namespace = self._held.namespace.name.hex()
        else:  # a server names it when it is entered
            namespace = self._facts.identity.namespace_hex if plan.address.folder else ""
        return WarmReport(
            str(plan.address), self._facts.model, namespace,
            layout.chunk_tokens, layout.payload_bytes, len(plan.preamble), dry_run, documents,
            self.work if dry_run else self._computed_tokens, self._seconds, self.engine_start_s,
            notes_on(self._facts, self._pieces, documents, self._sizes, plan.staleness),
        )  # fmt: skip
