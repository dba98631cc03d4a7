"""The KV tier's scheduler side: carries out what `decisions` chooses, through vLLM's connector.

It keeps vLLM's own bookkeeping of copies under way (which fences the blocks that they read) and
changes what is stored, and when: not every block as it fills, but what the engine's scheduler asks
for, and the rest of a job when it is preempted. Restored blocks are private: if they are lossy,
the job's block hashes are changed, so that no other request finds them in the prefix cache.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    DirectionalTransferStats,
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestOffloadState,
    TransferJobStatus,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadKey, ReqContext
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from alise_engine.kv_tier import metrics
from alise_engine.kv_tier.decisions import Copy, CopyCosts, hopeful, recompute_s, swap_s
from alise_engine.kv_tier.layout import Quantization
from alise_engine.kv_tier.manager import HostSlots, HostTierManager, tail_key
from alise_engine.kv_tier.spec import QuantizedOffloadingSpec

_INITIAL_BYTES_PER_S = {"store": 1e9, "load": 1e10}
"""Copy speed before any was measured: stores are slow, so that at first little is stored ahead;
loads are fast, so that some are made and measured."""
_SMOOTHING = 0.2
_SALT_KEY_BYTES = 64  # the longest key that blake2b takes


@dataclass(slots=True)
class _Load:
    job_id: str
    blocks: list[int]
    """On the device."""
    first: int
    """Position of the first one in the job's context."""
    damaged_from: int | None = None
    """Position of the first block that could not be read."""


class TierScheduler(OffloadingConnectorScheduler):  # type: ignore[misc]  # vLLM is untyped to us
    """Stores what it is told, loads what is worth loading."""

    manager: HostTierManager

    def __init__(
        self,
        spec: QuantizedOffloadingSpec,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(spec, vllm_config, kv_cache_config)
        self.is_on = spec.layout is not None
        self.block_tokens: int = spec.tokens_per_block[0]
        self._slot_bytes = spec.layout.slot_bytes if spec.layout is not None else 1
        self._workers: int = spec.config.parallel.world_size
        # Rejected drafts leave KV in the last block that is none of the answer's.
        self._keeps_tails = vllm_config.speculative_config is None
        self._is_lossy = spec.settings.quantization == Quantization.INT8
        self._bytes_per_s = dict(_INITIAL_BYTES_PER_S)
        self._refusals = 0
        """Preemptions at which copying seemed too slow, since a load was measured."""
        self._store_jobs: dict[int, TransferJob] = {}  # to go out with the next step
        self._loads: dict[int, _Load] = {}  # job_id -> what is on its way back
        self.prefill_s_per_token = 0.0

    # What the engine's scheduler asks.

    def costs(self) -> CopyCosts:
        """Return the measured costs per token."""
        token_bytes = self._slot_bytes / self.block_tokens
        return CopyCosts(
            store_s_per_token=token_bytes / self._bytes_per_s["store"],
            load_s_per_token=token_bytes / self._bytes_per_s["load"],
            prefill_s_per_token=self.prefill_s_per_token,
        )

    def copy_of(self, request: Request) -> Copy:
        """Return what the host holds of a running job."""
        tokens: int = min(request.num_computed_tokens, request.num_tokens)
        return Copy(context_tokens=tokens, stored_tokens=self.held_tokens(request))

    def store_ahead(self, request: Request, blocks: int) -> None:
        """Store up to `blocks` more blocks of a job that goes on running."""
        end = self.manager.blocks_of(request.request_id) + blocks
        self._store_jobs |= self._store(request, end, is_running=True)

    def store_before_preemption(self, request: Request) -> None:
        """Store what is missing of a job that is about to lose its blocks, if that pays."""
        copy, costs = self.copy_of(request), hopeful(self.costs(), self._refusals)
        if swap_s(copy, costs) >= recompute_s(copy, costs):
            self._refusals += 1
            return
        end = copy.context_tokens // self.block_tokens
        self._store_jobs |= self._store(request, end, is_running=False)
        if self._keeps_tails and self.manager.blocks_of(request.request_id) == end:
            self._store_jobs |= self._store_tail(request, copy.context_tokens)

    def held_tokens(self, request: Request) -> int:
        """Return how many tokens of a job the host holds."""
        tail = self.manager.tail_of(request.request_id)
        if tail is not None:
            return tail
        return self.manager.blocks_of(request.request_id) * self.block_tokens

    def report(self) -> None:
        """Write the gauges."""
        used = self.manager.used_slots()
        metrics.BYTES_HELD.set(used * self._slot_bytes * self._workers)
        for direction, bytes_per_s in self._bytes_per_s.items():
            metrics.BANDWIDTH.labels(direction).set(bytes_per_s)

    # What vLLM's scheduler calls.

    def get_num_new_matched_tokens(
        self,
        request: Request,
        num_computed_tokens: int,
        max_num_new_tokens: int | None = None,
    ) -> tuple[int | None, bool]:
        """Return how many tokens the host has beyond those on the device, if worth loading."""
        status = self._req_status[request.request_id]
        costs = hopeful(self.costs(), self._refusals)
        is_worthwhile = costs.load_s_per_token < costs.prefill_s_per_token
        if not self.held_tokens(request) or not is_worthwhile:
            for state in status.group_states:
                state.block_ids.clear()
            status.num_locally_computed_tokens = num_computed_tokens
            status.partial_tail_boundary = None
            return 0, False
        tokens, is_async = super().get_num_new_matched_tokens(
            request, num_computed_tokens, max_num_new_tokens
        )
        tail = self.manager.tail_of(request.request_id)
        if tokens is None or tail is None:
            return tokens, is_async
        if num_computed_tokens + tokens == tail // self.block_tokens * self.block_tokens:
            status.partial_tail_boundary = tail
            return tail - num_computed_tokens, True
        return tokens, is_async

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Note the load that vLLM has made room for."""
        is_return = request.num_preemptions > 0 and request.num_computed_tokens == 0
        if is_return:
            self._count_lookup(request, num_external_tokens)
        before = set(self._current_batch_load_jobs)
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        for job_id in self._current_batch_load_jobs.keys() - before:
            destination = self._current_batch_load_jobs[job_id].dst_spec
            self._loads[job_id] = _Load(
                request.request_id, destination.block_ids.tolist(), destination.block_indices[0]
            )
        if num_external_tokens and self._is_lossy:
            first = self._req_status[request.request_id].num_locally_computed_tokens
            make_private(request, first // self.block_tokens)
        if is_return:
            self.manager.drop_tail(request.request_id)

    def build_connector_meta(
        self, scheduler_output: SchedulerOutput
    ) -> OffloadingConnectorMetadata:
        """Return this step's copies, and count what they move."""
        meta = super().build_connector_meta(scheduler_output)
        for direction, jobs in (("store", meta.store_jobs), ("load", meta.load_jobs)):
            specs = [j.dst_spec if direction == "store" else j.src_spec for j in jobs.values()]
            slots = sum(len(spec.slots) for spec in specs)
            if slots:
                moved = slots * self._slot_bytes * self._workers
                metrics.BYTES_MOVED.labels(direction).inc(moved)
        return meta

    def _build_store_jobs(self, *_: SchedulerOutput) -> dict[int, TransferJob]:
        """Return what has been chosen since the last step, not every block that filled."""
        jobs, self._store_jobs = self._store_jobs, {}
        return jobs

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Learn from finished copies; forget what could not be read."""
        if connector_output.invalid_block_ids:
            self._note_damage(connector_output.invalid_block_ids)
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, OffloadingWorkerMetadata):
            self._measure("store", meta.transfer_stats.store)
            self._measure("load", meta.transfer_stats.load)
        super().update_connector_output(connector_output)
        for transfer_id in [i for i in self._loads if i not in self._jobs]:
            load = self._loads.pop(transfer_id)
            if load.damaged_from is not None:
                self.manager.drop_after(load.job_id, load.damaged_from, "failed")

    def _note_damage(self, invalid_blocks: set[int]) -> None:
        # Reported when a load begins; on a GPU it ends some steps later.
        for load in self._loads.values():
            if load.damaged_from is None:
                places = (i for i, block in enumerate(load.blocks) if block in invalid_blocks)
                place = next(places, None)
                load.damaged_from = None if place is None else load.first + place

    def reset_cache(self) -> None:
        """Forget all copies."""
        super().reset_cache()
        self._store_jobs.clear()
        self._loads.clear()

    # Stores.

    def _storable(self, request: Request) -> RequestOffloadState | None:
        """Return vLLM's state of a job; None while it is loaded, which no store may overlap."""
        status: RequestOffloadState | None = self._req_status.get(request.request_id)
        if status is None or any(not self._jobs[i].is_store for i in status.transfer_jobs):
            return None
        return status

    def _store(self, request: Request, end: int, *, is_running: bool) -> dict[int, TransferJob]:
        """Return the job that stores a job's blocks up to the `end`th, as far as there is room."""
        job_id = request.request_id
        status = self._storable(request)
        if status is None:
            return {}
        status.update_offload_keys()
        (state,) = status.group_states
        stored = self.manager.blocks_of(job_id)
        wanted = min(end, len(state.block_ids), len(state.offload_keys)) - stored
        if wanted <= 0:
            return {}
        room = self.manager.make_room(job_id, wanted, is_running=is_running)
        if not room:
            return {}
        # vLLM stores from here to the last block that this step completes: say which that is.
        state.next_stored_chunk_idx = stored
        tokens = (stored + room) * self.block_tokens
        step: Any = SimpleNamespace(
            num_scheduled_tokens={job_id: tokens - request.num_computed_tokens},
            finished_req_ids=(),
        )
        jobs: dict[int, TransferJob] = super()._build_store_jobs(step)
        return jobs

    def _store_tail(self, request: Request, tokens: int) -> dict[int, TransferJob]:
        """Return the job that stores a job's last block, which `tokens` tokens do not fill."""
        job_id, place = request.request_id, tokens // self.block_tokens
        status = self._storable(request)
        if status is None or tokens % self.block_tokens == 0:
            return {}
        (state,) = status.group_states
        if place >= len(state.block_ids):
            return {}
        if not self.manager.make_room(job_id, 1, is_running=False):
            return {}
        key, block = tail_key(tokens), state.block_ids[place]
        output = self.manager.prepare_store([key], status.req_context)
        assert output is not None, "there was room"
        transfer_id: int = self._generate_job_id()
        status.transfer_jobs.add(transfer_id)
        self._jobs[transfer_id] = TransferJobStatus(
            req_id=job_id,
            pending_count=self._workers,
            keys={key},
            is_store=True,
            deferred_fence_block_ids=[block],
        )
        source = GPULoadStoreSpec([block], group_sizes=[1], block_indices=[place])
        slots = HostSlots(output.store_spec.slots, tokens % self.block_tokens)
        return {transfer_id: TransferJob(job_id, source, slots)}

    def _make_boundary_key(
        self,
        request: Request,  # noqa: ARG002 # vLLM's hook
        group_idx: int,  # noqa: ARG002
        boundary_tokens: int,
        req_context: ReqContext,
    ) -> OffloadKey:
        """Return the key under which the unfilled block before a boundary was stored."""
        key = tail_key(boundary_tokens)
        req_context.set_offload_key_position(key, boundary_tokens)
        return key

    # Counting.

    def _measure(self, direction: str, stats: DirectionalTransferStats) -> None:
        if stats.bytes and stats.time > 0:
            measured = stats.bytes / stats.time
            old = self._bytes_per_s[direction]
            self._bytes_per_s[direction] = old + _SMOOTHING * (measured - old)
            if direction == "load":
                self._refusals = 0

    def _count_lookup(self, request: Request, loaded_tokens: int) -> None:
        """Count one return of a preempted job by what the host had of it."""
        status = self._req_status[request.request_id]
        local = status.num_locally_computed_tokens
        missing = request.num_tokens - 1 - local - loaded_tokens
        if missing <= 0:
            result = "hit"
        elif self.held_tokens(request) > local and not loaded_tokens:
            result = "recompute_cheaper"
        else:
            result = self.manager.why_incomplete(request.request_id)
        metrics.LOOKUPS.labels(result).inc()
        metrics.RESTORED_TOKENS.inc(loaded_tokens)


def make_private(request: Request, first_block: int) -> None:
    """Change a job's block hashes from `first_block` on, so that only it can match them.

    Later blocks chain from the last hash and so become private too: they hold lossy KV, or KV that
    was computed with some before it.
    """
    key = request.request_id.encode()[-_SALT_KEY_BYTES:]
    hashes = request.block_hashes
    if not hashes:
        request.cache_salt = f"alise-{request.request_id}"  # goes into the first block's hash
        return
    # With only the last, unfilled block restored, there is none yet that its hash would chain from.
    first_block = min(first_block, len(hashes) - 1)
    hashes[first_block:] = [
        hashlib.blake2b(value, digest_size=len(value), key=key).digest()
        for value in hashes[first_block:]
    ]


def tier_of(connector: object) -> TierScheduler | None:
    """Return the tier behind an engine's KV connector; None when it is off or another one."""
    tier = getattr(connector, "connector_scheduler", None)
    return tier if isinstance(tier, TierScheduler) and tier.is_on else None
