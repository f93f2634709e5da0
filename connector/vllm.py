"""The vLLM connector: ``PrefixStoreConnector``. Maps vLLM's calls to the two halves, no more.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "PrefixStoreConnector",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"dir": "/var/cache/kv"}}'

vLLM finds it by that name through the entry point of this package, or anywhere with
``"kv_connector_module_path": "connector.vllm"``. One instance lives in the scheduler's process and
one in each worker's; both open the same store folder.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)

from connector import blend_compat, compat, groups, ranks
from connector.geometry import Geometry, geometry_of
from connector.handle import StoreHandle
from connector.kept_speed import KeptSpeed, name_of
from connector.messages import BlendLoaded, StepMetadata, WorkerReport
from connector.namespaces import shown_identity
from connector.options import EngineOptions
from connector.page_probe import PageLayoutError
from connector.scheduler_side import SchedulerSide
from connector.stats import PrefixStoreProm, PrefixStoreStats
from connector.worker_side import WorkerSide
from prefixstore.errors import StoreError

if TYPE_CHECKING:
    from prefixstore.identity import ModelIdentity
    from prefixstore.layout import Layout

logger = logging.getLogger("vllm.prefixstore")
NAME = "PrefixStoreConnector"


def register() -> None:
    """Entry point ``vllm.general_plugins``: make the connector known by name, in every process."""
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "connector.vllm", NAME)


class PrefixStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module docstring; the methods are those of `KVConnectorBase_V1`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config, self._kv_config = vllm_config, kv_cache_config
        options = EngineOptions.parse(transfer.kv_connector_extra_config)
        self._options = compat.heed_role(options, transfer)
        wanted = self._options.chunk_tokens, self._options.codec
        geometry = geometry_of(vllm_config, kv_cache_config, *wanted)
        self._layout: Layout | None = geometry.layout
        self._states = geometry.states
        known = geometry.groups, kv_cache_config.kv_cache_groups
        self._all_or_nothing = groups.are_all_or_nothing(*known)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._handle: StoreHandle | None = None
        self._kept: KeptSpeed | None = None
        self._unusable = self._no_blending = ""
        self._reported_unusable = False
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler_side(geometry)
        else:
            self._unusable = geometry.refused  # vLLM may tell workers another than the scheduler

    def _start_scheduler_side(self, geometry: Geometry) -> None:
        transfer = self._config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            # vLLM's default fails the request when a load fails. A cache must not do that; vLLM
            # reads the policy after it has made the connector, so it can still be put right.
            logger.warning("prefixstore: kv_load_failure_policy is now 'recompute': a load that "
                           "fails must not fail the request")  # fmt: skip
            transfer.kv_load_failure_policy = "recompute"
        refused = geometry.refused
        if geometry.layout is not None:
            try:
                identify = compat.identities(self._config, geometry.layout.chunk_tokens)
            except (ValueError, StoreError, OSError) as error:
                refused = f"the model cannot be identified: {error}"
        if refused or geometry.layout is None:
            logger.warning("prefixstore: this engine is served without the store: %s", refused)
            return
        # A verdict is of the model, whatever its KV is stored as, and so is its speed.
        known = self._options, geometry.layout, identify(None)
        claims = blend_compat.claims_of(self._config, self._kv_config, *known)

        def identify_stored(lora_request: Any) -> ModelIdentity:
            return identify(lora_request).with_codec(self._options.codec)

        self._handle = StoreHandle(self._options)
        self._log_start(identify_stored(None), geometry)
        if self._options.dir:
            name = name_of(identify(None), compat.computed_by(self._config))
            self._kept = KeptSpeed(self._options.dir, name)
        self._scheduler = SchedulerSide(
            self._options, self._handle, identify_stored, geometry.layout, geometry.block_tokens,
            compat.steps_ahead(self._config), claims,
            partial(blend_compat.isolate, self._config), geometry.groups, geometry.states,
            self._kept,
        )  # fmt: skip

    def _log_start(self, identity: ModelIdentity, geometry: Geometry) -> None:
        assert geometry.layout is not None
        assert self._handle is not None
        logger.info(
            "prefixstore: %s, namespace %s, chunks of %d tokens (%d bytes%s)",
            self._handle.named, identity.namespace_hex[:12],
            geometry.layout.chunk_tokens, geometry.layout.payload_bytes,
            f", {identity.codec}" if identity.codec else "",
        )  # fmt: skip

    # ------------------------------------------------------------------ scheduler
    @property
    def requires_kv_delivery(self) -> bool:
        """A cache promises nobody its KV: preempted requests keep their output."""
        return False

    def on_new_request(self, request: Any) -> None:
        """Start looking the prompt up."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond vLLM's own that will be loaded, asynchronously."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Take note of the request's blocks."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """This step's message to the workers."""
        if self._scheduler is None:
            return StepMetadata()
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """The workers' news."""
        if self._scheduler is not None:
            report = connector_output.kv_connector_worker_meta
            assert report is None or isinstance(report, WorkerReport)
            loaded = sorted(connector_output.finished_recving or ())
            invalid = set(connector_output.invalid_block_ids or ())
            failed = getattr(connector_output, "failed_recving", None) or ()
            self._scheduler.worker_news(report, loaded, invalid, failed)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never holds blocks back: what was to be saved has been copied."""
        if self._scheduler is None:
            return False, None
        return False, self._scheduler.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`; vLLM calls this one."""
        return self.request_finished(request, [])

    def reset_cache(self) -> bool:
        """vLLM asks for this when KV computed so far is void, as after an update of the weights.

        The store keeps what it has, for engines with the weights of before; this engine shares
        nothing with it from now on.
        """
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # ------------------------------------------------------------------ worker
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Map the pages and start this rank's threads."""
        if self._layout is None:
            return
        try:
            rank = ranks.rank_of(
                self._config, self._kv_config, self._layout, self._states, kv_caches,
                self._options.codec,
            )  # fmt: skip
        except PageLayoutError as error:
            self._unusable = str(error)
            logger.warning("prefixstore: this engine is served without the store: %s", error)
            return
        rank.engine, self._no_blending = blend_compat.engine_of(
            self._config, self._kv_config, rank, kv_caches, self._options
        )
        self._handle = StoreHandle(self._options)
        step_tokens = int(self._config.scheduler_config.max_num_batched_tokens)
        share = ranks.share_of_device(self._config)
        self._worker = WorkerSide(self._options, self._handle, rank, step_tokens, share)

    def _metadata(self) -> StepMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepMetadata)
        return meta

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Queue this step's loads."""
        if self._worker is not None:
            self._worker.start_loads(self._metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads end before their request is scheduled."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing yet: chunks are copied when all layers are done."""

    def wait_for_save(self) -> None:
        """Copy the chunks this step completed to the staging ring."""
        if self._worker is not None:
            self._worker.save(self._metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose load has ended."""
        meta = self._metadata() if self.has_connector_metadata() else StepMetadata()
        if self._worker is None:
            # The scheduler does not know yet that this worker cannot load: every load fails.
            return None, {job.req_id for job in meta.loads} or None
        return None, self._worker.finished(meta.idle) or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Requests whose load has ended, and those among them that must be computed as a whole."""
        loaded = self.get_finished(finished_req_ids)[1] or set()
        failed = loaded if self._worker is None else self._worker.loader.failed_requests()
        failed = failed if self._all_or_nothing else set()
        return compat.TransferResults(finished_recving=loaded, failed_recving=set(failed))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load failed: vLLM recomputes from the first of them on."""
        if self._all_or_nothing:  # what is before that block may be gone, too: see above
            return set()
        if self._worker is None:
            meta = self._metadata() if self.has_connector_metadata() else StepMetadata()
            failed = {block for job in meta.loads for block in job.blocks_from(0)}
            size = int(self._config.cache_config.block_size)
            for rows in (job.blend for job in meta.loads if job.blend is not None):
                failed.update(rows.blocks[rows.computed // size :])
            return failed
        return self._worker.failed_blocks()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        """This rank's news for the scheduler."""
        report = None if self._worker is None else self._worker.report()
        if self._worker is None and self.has_connector_metadata():
            jobs = [job for job in self._metadata().loads if job.blend is not None]
            if jobs:
                aborted = BlendLoaded(1, frozenset(), True)
                report = WorkerReport(blends={job.req_id: aborted for job in jobs})
        if self._unusable and not self._reported_unusable:
            self._reported_unusable = True
            report = replace(report or WorkerReport(), disabled=self._unusable)
        if self._no_blending:
            why, self._no_blending = self._no_blending, ""
            report = replace(report or WorkerReport(), no_blending=why)
        return report

    # ------------------------------------------------------------------ both
    def get_kv_connector_stats(self) -> PrefixStoreStats | None:
        """What has happened since the last call."""
        if self._worker is not None:
            if self.has_connector_metadata() and self._metadata().idle:
                return None  # vLLM 0.26 forgets what it is told in a step without outputs
            stats = PrefixStoreStats.of(*self._worker.take_stats())
        elif self._scheduler is not None:
            stats = PrefixStoreStats.of(self._scheduler.take_counts(), [], [])
        else:
            return None
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> PrefixStoreStats | None:
        """Rebuild statistics in the process that shows them."""
        return PrefixStoreStats(data=data) if data is not None else PrefixStoreStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PrefixStoreProm:
        """Prometheus metrics."""
        shown = shown_identity(vllm_config)
        return PrefixStoreProm(vllm_config, metric_types, labelnames, per_engine_labelvalues, shown)

    def shutdown(self) -> None:
        """Store what is staged and let go of the store."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
        if self._kept is not None:
            self._kept.close()
        if self._handle is not None:
            self._handle.close()
