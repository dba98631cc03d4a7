"""Steers the KV tier from the queue: copies out before they are needed there, back before here.

Called in each step by the engine's scheduler, whose jobs, order and estimates it reads. The choices
are `decisions`'; starting a load for a job without a slot is done as vLLM does it for one with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from alise_scheduler.waiting import waiting_times
from vllm.v1.core.sched.scheduler import KV_FETCH_IN_PROGRESS
from vllm.v1.request import Request, RequestStatus

from alise_engine.dispatch import OrderKey
from alise_engine.kv_tier import metrics
from alise_engine.kv_tier.decisions import (
    LikelyVictim,
    TierParameters,
    choose_stores,
    is_prefetch_due,
    store_budget_blocks,
)
from alise_engine.kv_tier.scheduler import TierScheduler

_VICTIMS_CONSIDERED = 16
_PREFETCHES_CONSIDERED = 4
_WAITING_CONSIDERED = 256
"""Jobs farther back in the queue count as waiting for ever."""
_PREFETCH_FREE_SHARE = 0.1
"""A job without a slot is given blocks only while so much of the pool stays free."""
_SPARE_BLOCKS = 8
"""What is left of a step's budget is kept up to this: one step's may be less than a block."""


@dataclass(frozen=True, slots=True)
class JobView:
    """How the engine's scheduler answers questions about its jobs."""

    key_of: Callable[[Request], OrderKey]
    remaining_s: Callable[[Request], float | None]
    """Expected work left; None when it is unknown."""
    frees_s: Callable[[], list[float]]
    """Expected seconds until each running job ends, ascending, where known."""
    is_likely_victim: Callable[[Request], bool]
    """Whether dispatch may preempt it at all."""
    has_place_for_next: Callable[[], bool]
    """Whether the first waiting job needs nobody's slot or blocks."""


class TierSteering:
    """Decides for one engine's scheduler, in its thread."""

    def __init__(
        self,
        scheduler: Any,  # AliseScheduler; its module imports this one
        tier: TierScheduler,
        jobs: JobView,
    ) -> None:
        self._scheduler = scheduler
        self._tier = tier
        self._jobs = jobs
        self._parameters = TierParameters()
        self._prefetches: dict[str, bool] = {}  # req_id -> whether a slot had to wait for it
        self._credit_blocks = 0.0
        self._planned: list[tuple[str, int]] = []  # (req_id, blocks) to store in the next step
        tier.manager.waiting_times = self.waiting_times

    def waiting_times(self, job_id: str) -> Mapping[str, float]:
        """Return the EWT of the first waiting jobs and of `job_id`, as if it waited too."""
        queue = list(islice(self._scheduler.waiting, _WAITING_CONSIDERED))
        job = self._scheduler.requests.get(job_id)
        if job is not None and job not in queue:
            queue.append(job)
            queue.sort(key=self._jobs.key_of)
        return dict(zip((r.request_id for r in queue), self._times(queue), strict=True))

    def _times(self, queue: Sequence[Request]) -> list[float]:
        work = (self._jobs.remaining_s(request) for request in queue)
        slots = self._scheduler.max_num_active_reqs - len(self._scheduler.running)
        return waiting_times(
            self._jobs.frees_s(), slots, [math.inf if s is None else s for s in work]
        )

    def prefetch(self, step_s: float) -> None:
        """Start loading the copies of jobs whose turn is near; with a slot free vLLM does it."""
        scheduler = self._scheduler
        self._count_prefetches()
        holding = list(scheduler.kv_holding_waiting)
        slots = scheduler.max_num_active_reqs - len(scheduler.running) - len(holding)
        if slots > 0 or not self._tier.manager.used_slots():
            return
        queue = holding + list(islice(scheduler.waiting, _PREFETCHES_CONSIDERED))
        held_tokens = [self._restorable_tokens(request) for request in queue]
        if not any(held_tokens):
            return
        load_s_per_token = self._tier.costs().load_s_per_token
        due = [
            request
            for request, tokens, ewt_s in zip(queue, held_tokens, self._times(queue), strict=True)
            if tokens
            and is_prefetch_due(ewt_s, tokens * load_s_per_token, step_s, self._parameters)
        ]
        for request in due:
            if request not in holding and not self._start_load(request):
                return

    def _restorable_tokens(self, request: Request) -> int:
        """Return how many tokens of a job may be loaded now."""
        # A batch in flight may still deliver a preempted job's last token, and end it.
        is_out = request.status == RequestStatus.PREEMPTED and not request.num_stale_output_tokens
        return self._tier.held_tokens(request) if is_out else 0

    def _start_load(self, request: Request) -> bool:
        """Give a job without a slot its blocks, and load them; False if there is no room."""
        scheduler = self._scheduler
        cache = scheduler.kv_cache_manager
        needed = request.num_tokens // scheduler.block_size + 1
        spare = _PREFETCH_FREE_SHARE * cache.block_pool.num_gpu_blocks
        if cache.block_pool.get_num_free_blocks() - needed < spare:
            return False
        hit_blocks, local_tokens, _, _ = scheduler._get_local_prefix_cache_hit(request)
        if local_tokens % scheduler.block_size:
            return False
        tokens, _ = scheduler.connector.get_num_new_matched_tokens(request, local_tokens)
        if not tokens:
            return False
        blocks = cache.allocate_slots(
            request,
            0,
            num_new_computed_tokens=local_tokens,
            new_computed_blocks=hit_blocks,
            num_external_computed_tokens=tokens,
            delay_cache_blocks=True,
            full_sequence_must_fit=scheduler.scheduler_reserve_full_isl,
            reserved_blocks=scheduler._inflight_prefill_reserved_blocks(),
            has_scheduled_reqs=bool(scheduler.running),
        )
        if blocks is None:
            return False
        held = cache.get_blocks(request.request_id)
        scheduler.connector.update_state_after_alloc(request, held, tokens)
        scheduler.waiting.remove_request(request)
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        request.num_computed_tokens = local_tokens + tokens
        scheduler._inflight_prefills.add(request)
        scheduler._set_kv_fetch_stage(request, KV_FETCH_IN_PROGRESS)
        scheduler._enqueue_waiting_request(request)
        self._prefetches[request.request_id] = False
        return True

    def _count_prefetches(self) -> None:
        scheduler = self._scheduler
        has_free_slot = len(scheduler.running) < scheduler.max_num_active_reqs
        for job_id, was_late in list(self._prefetches.items()):
            request = scheduler.requests.get(job_id)
            if request is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                is_back = job_id in scheduler.finished_recving_kv_req_ids
                self._prefetches[job_id] = was_late or (has_free_slot and not is_back)
                continue
            del self._prefetches[job_id]
            metrics.PREFETCHES.labels("late" if was_late else "in_time").inc()

    def plan_stores(self, step_s: float) -> None:
        """Choose some blocks of likely victims to store ahead, while somebody waits for a place."""
        if not self._scheduler.waiting or self._jobs.has_place_for_next():
            return
        block_s = self._tier.costs().store_s_per_token * self._tier.block_tokens
        budget = store_budget_blocks(step_s, block_s, self._parameters)
        self._credit_blocks = min(self._credit_blocks, _SPARE_BLOCKS) + budget
        budget_blocks = int(self._credit_blocks)
        self._planned = choose_stores(self._likely_victims(), budget_blocks, self._parameters)

    def store_ahead(self) -> None:
        """Store what was planned beside the last step, of jobs that still run."""
        planned, self._planned = self._planned, []
        for job_id, blocks in planned:
            request = self._scheduler.requests.get(job_id)
            if request is not None and self._jobs.is_likely_victim(request):
                self._tier.store_ahead(request, blocks)
                self._credit_blocks -= blocks

    def _likely_victims(self) -> Iterator[LikelyVictim]:
        # The scheduler keeps `running` best first, but for prompts that are being computed.
        for request in self._scheduler.running[: -_VICTIMS_CONSIDERED - 1 : -1]:
            if self._jobs.is_likely_victim(request) and not request.is_prefill_chunk:
                copy = self._tier.copy_of(request)
                missing = copy.context_tokens - copy.stored_tokens
                unstored = missing // self._tier.block_tokens
                remaining_s = self._jobs.remaining_s(request)
                yield LikelyVictim(request.request_id, remaining_s, max(unstored, 0))
