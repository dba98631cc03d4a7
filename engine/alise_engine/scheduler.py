"""vLLM's scheduler with ALISE's order: the plug-in for `--scheduler-cls`.

A thin adapter: it keeps a record of each live job, hands waiting and running jobs to `dispatch`,
carries its decisions out through vLLM's own paths, and passes events to and estimates from the
stream. The parent schedules; this class only orders the queue and makes room. It does no I/O.

Every touch of vLLM's internals is in this file and in `job_queue.py`, and named in
tests/test_alise_engine_internals.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from alise_scheduler.events import Preempted, StepTiming
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import KV_FETCH_IN_PROGRESS
from vllm.v1.request import Request, RequestStatus

from alise_engine import metrics
from alise_engine.client import DEFAULT_COSTS, Costs, Estimate, SidecarClient
from alise_engine.dispatch import (
    RECOMPUTE_MARGIN_S,
    SWAP_MARGIN_S,
    DispatchParameters,
    OrderKey,
    Room,
    RunningJob,
    WaitingJob,
    choose_victims,
    is_far_behind,
)
from alise_engine.events import EngineEvent, Snapshot
from alise_engine.hello import HelloMaker
from alise_engine.job_queue import KeyedRequestQueue
from alise_engine.jobs import JobRecord, arrived, finished, progress
from alise_engine.kv_tier.decisions import preemption_s
from alise_engine.kv_tier.scheduler import tier_of
from alise_engine.kv_tier.steering import JobView, TierSteering
from alise_engine.settings import EngineSettings

logger = init_logger("vllm.alise.scheduler")

REPORT_INTERVAL_S = 0.25
"""Progress goes out this often: not per token."""
MAX_ESTIMATES_PER_STEP = 128
"""Bounds what applying estimates may add to a step."""
_BLOCKED_RETRY_S = 1.0
_STEPS_PER_REPORT = 16
_VICTIMS_CONSIDERED = 16
"""Only the worst running jobs are looked at: the better ones are not behind anybody by a margin."""
_STEP_SMOOTHING = 0.2


class AliseScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM is untyped to us
    """vLLM's scheduler, ordered and preempted by the sidecar's priorities."""

    max_num_active_reqs: int  # vLLM's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = EngineSettings.from_env(os.environ)
        self._jobs: dict[str, JobRecord] = {}  # req_id -> record
        self._client: SidecarClient | None = None
        self._tier = tier_of(self.connector)
        if self._tier is not None:
            self._tier.prefill_s_per_token = DEFAULT_COSTS.prefill_s_per_token
        if self._settings.address is None:
            logger.warning("ALISE_SCHEDULER is not set: scheduling is stock vLLM's")
            return
        # With classes (`--scheduling-policy priority`) a request's own `priority` ranks above our
        # order. The parent's FCFS path preempts `running[-1]` when blocks run out, which is the
        # worst by our order as we keep `running` sorted; its PRIORITY path would ignore that order.
        self._has_classes = self.scheduler_config.policy == SchedulingPolicy.PRIORITY.value
        self.policy = SchedulingPolicy.FCFS
        self.waiting = KeyedRequestQueue(self._key_of)
        self.kv_holding_waiting = KeyedRequestQueue(self._key_of)
        self._next_number = 0
        self._ranked_jobs = 0
        self._next_report_s = 0.0
        self._no_block_preemption_until_s = 0.0
        self._events: list[EngineEvent] = []
        """For the sidecar. They go out beside the model: the stream's threads would take turns with
        this one, which has the step to start."""
        self._steps: list[StepTiming] = []
        self._open_step: tuple[float, StepTiming] | None = None
        self._accepted_drafts = 0  # since a step was closed
        usual_s = RECOMPUTE_MARGIN_S if self._tier is None else SWAP_MARGIN_S
        margin_s = self._settings.margin_s
        self._dispatch = DispatchParameters(usual_s if margin_s is None else margin_s)
        self._step_s = 0.0
        self._returning: set[str] = set()
        """Jobs that vLLM loads as it had a slot for them: the slot is kept meanwhile."""
        self._lost_tokens: dict[str, int] = {}  # req_id -> tokens it had when it was preempted
        self._unreported_preemptions = 0
        self._unreported_preempted_tokens = 0
        self._unreported_recomputed_tokens = 0
        self._unreported_unknown_jobs = 0
        self._steering: TierSteering | None = None
        if self._tier is not None:
            jobs = JobView(
                self._key_of,
                self._remaining_s,
                self._frees_s,
                self._is_likely_victim,
                self._has_place_for_next,
            )
            self._steering = TierSteering(self, self._tier, jobs)
        self._client = SidecarClient(
            self._settings.address,
            self._settings.tls,
            HelloMaker(self.vllm_config, self.max_num_active_reqs, self._settings),
        )
        self._client.start()

    # What vLLM calls.

    def add_request(self, request: Request) -> None:
        """Queue `request` by its arrival and tell the sidecar; waits for nobody."""
        if self._client is not None and request.request_id not in self._jobs:
            class_ = request.priority if self._has_classes else 0
            record = JobRecord(request, class_, self._next_number, time.monotonic())
            self._next_number += 1
            record.cached_prompt_tokens = self._cached_tokens_of(request)
            self._jobs[request.request_id] = record
            self._events.append(arrived(record))
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Apply new estimates, make room for better jobs, and let vLLM schedule."""
        if self._client is None:
            return super().schedule(throttle_prefills)
        now_s = time.monotonic()
        self._close_step(now_s)
        self._take_estimates(now_s)
        victims: list[Request] = []
        if self._ranked_jobs or self._has_classes:
            self.running.sort(key=self._key_of)
            if not throttle_prefills and self._pause_state == PauseState.UNPAUSED:
                victims = self._preempt_for_waiting(now_s)
            # vLLM hands out the step's tokens in this order: a prompt that takes them all would
            # stop the answers behind it. They go first, as in stock; else nothing is moved.
            self.running.sort(key=self._fills_a_step)
        if self._tier is not None and self._steering is not None:
            self._tier.prefill_s_per_token = self._client.costs.prefill_s_per_token
            self._steering.prefetch(self._step_s)
            self._steering.store_ahead()
        slots = self.max_num_active_reqs
        self._returning = {job_id for job_id in self._returning if self._is_loading(job_id)}
        self.max_num_active_reqs = slots - len(self._returning)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.max_num_active_reqs = slots
            # Held back meanwhile: a victim must not be admitted again in the same step.
            for request in victims:
                self.waiting.add_request(request)
        self._count_recomputed(output)
        self._open_step_of(output, now_s)
        if not output.num_scheduled_tokens:  # there is no batch to wait for
            self._do_beside_the_model()
        return output

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Do what vLLM does; it asks as soon as a batch is on its way, and waits for it then."""
        if self._client is not None and scheduler_output.num_scheduled_tokens:
            self._do_beside_the_model()
        return super().get_grammar_bitmask(scheduler_output)

    def shutdown(self) -> None:
        """End the stream with the engine."""
        if self._client is not None:
            self._client.stop()
        super().shutdown()

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        if not request.num_output_tokens:
            record = self._jobs.get(request.request_id)
            if record is not None:
                record.first_token_s = time.monotonic() - record.arrival_s
                if (stats := request.prefill_stats) is not None:
                    record.cached_prompt_tokens = stats.num_cached_tokens
        result: tuple[list[int], bool] = self._stock()._update_request_with_output(
            request, new_token_ids, is_stale
        )
        return result

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        self._stock()._update_after_schedule(scheduler_output)

    def _stock(self) -> Any:
        """Return this object as vLLM's class for its mode: `Scheduler`, or `AsyncScheduler`.

        The synchronous mode does not need what `AsyncScheduler` does for each job in each step.
        """
        if self.scheduler_config.async_scheduling:
            return super()
        return super(AsyncScheduler, self)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        # Dispatch's preemptions and vLLM's own, for want of blocks, come through here.
        if self._tier is not None:
            self._tier.store_before_preemption(request)
        if self._client is not None:
            tokens = min(request.num_computed_tokens, request.num_tokens)
            self._lost_tokens[request.request_id] = tokens
            self._unreported_preempted_tokens += tokens
            self._events.append(Preempted(request.request_id, request.num_output_tokens))
        super()._preempt_request(request, timestamp, drop_stale_output=drop_stale_output)

    def _set_kv_fetch_stage(self, request: Request, stage: str | None) -> None:
        # vLLM says here that it begins to load a job's copy. In the same step it goes on admitting
        # and would give the slot to the next job. (One that is loaded ahead of its turn has no
        # slot, and is off the waiting queue by now.)
        begins = self._client is not None and stage == KV_FETCH_IN_PROGRESS
        if begins and self.waiting and self.waiting.peek_request() is request:
            self._returning.add(request.request_id)
            self.max_num_active_reqs -= 1
        super()._set_kv_fetch_stage(request, stage)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        record = self._jobs.pop(request.request_id, None)
        if record is not None and self._client is not None:
            self._ranked_jobs -= record.is_ranked
            self._lost_tokens.pop(request.request_id, None)
            self._events.append(finished(record))
        result: tuple[dict[str, Any] | None, dict[str, Any] | None] = super()._free_request(
            request, delay_free_blocks
        )
        return result

    def _cached_tokens_of(self, request: Request) -> int:
        """Return how much of its prompt the prefix cache has now; nothing is reserved by that."""
        manager = self.kv_cache_manager
        if not manager.prefix_cache_lookup_enabled(request):
            return 0
        hit = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        return int(hit[1])

    def _is_loading(self, job_id: str) -> bool:
        request = self.requests.get(job_id)
        return (
            request is not None
            and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            and job_id not in self.finished_recving_kv_req_ids
        )

    def _do_beside_the_model(self) -> None:
        """Do what can wait until a batch is on its way, so that no step takes longer by it."""
        assert self._client is not None
        if self._steering is not None and self._ranked_jobs:
            self._steering.plan_stores(self._step_s)
        now_s = time.monotonic()
        if now_s >= self._next_report_s or not self._jobs:
            self._next_report_s = now_s + REPORT_INTERVAL_S
            self._report(self._client)
        for event in self._events:
            self._client.send(event)
        self._events.clear()

    # Estimates in, decisions out.

    def _key_of(self, request: Request) -> OrderKey:
        return self._jobs[request.request_id].key

    def _take_estimates(self, now_s: float) -> None:
        client = self._client
        assert client is not None
        if client.wants_snapshot():
            self._events.clear()
            client.send_snapshot(self._snapshot())
        if self._ranked_jobs and client.down_for_s(now_s) > self._settings.stale_after_s:
            logger.warning(
                "No scheduler sidecar for %.1f s: jobs are ordered by arrival (FCFS) until it "
                "is back",
                client.down_for_s(now_s),
            )
            self._forget_estimates()
            # A sidecar that hung and comes back would not say again what it has said.
            client.start_over()
        for estimate in client.receive(MAX_ESTIMATES_PER_STEP):
            self._apply(estimate)

    def _apply(self, estimate: Estimate) -> None:
        record = self._jobs.get(estimate.job_id)
        if record is None:
            self._unreported_unknown_jobs += 1
            return
        self._ranked_jobs += not record.is_ranked
        record.is_ranked = True
        record.remaining_tokens = estimate.remaining_tokens
        record.at_output_tokens = estimate.at_output_tokens
        if record.priority != estimate.priority:
            record.rank(estimate.priority)
            self._reorder(record.request)

    def _reorder(self, request: Request) -> None:
        self.waiting.reorder(request)
        self.kv_holding_waiting.reorder(request)

    def _forget_estimates(self) -> None:
        for record in self._jobs.values():
            if record.is_ranked:
                record.is_ranked = False
                record.remaining_tokens = None
                record.rank(record.arrival_s)
                self._reorder(record.request)
        self._ranked_jobs = 0

    def _preempt_for_waiting(self, now_s: float) -> list[Request]:
        """Preempt whom dispatch names; return them, taken out of the waiting queue."""
        if not self._settings.preempts or not self.waiting or not self.running:
            return []
        if self._has_place_for_next():
            return []
        slots = self._free_slots()
        if slots < 1 and not is_far_behind(
            self._key_of(self.running[-1]),
            self._key_of(self.waiting.peek_request()),
            self._dispatch,
        ):
            return []
        is_blocked = now_s < self._no_block_preemption_until_s
        blocks = (
            self.kv_cache_manager.block_pool.num_gpu_blocks
            if is_blocked
            else self._kv_blocks_left()
        )
        room = Room(slots, blocks, self._frees_s())
        if slots < 1 and room.wait_s(0) <= self._dispatch.margin_s:
            return []
        worst = self.running[: -_VICTIMS_CONSIDERED - 1 : -1]
        running = [self._running_job(request) for request in worst]
        waiting = self._waiting_jobs()
        victim_ids = choose_victims(waiting, running, room, self._dispatch)
        if not victim_ids:
            return []
        if slots > 0:
            # Blocks were short. They are counted without shared prefixes and reservations, so
            # the candidate may still not fit: give it time before anybody else is preempted.
            self._no_block_preemption_until_s = now_s + _BLOCKED_RETRY_S
        victims = [self.requests[job_id] for job_id in victim_ids]
        for request in victims:
            self._preempt(request, now_s)
        return victims

    def _preempt(self, request: Request, now_s: float) -> None:
        self.running.remove(request)
        self.prev_step_scheduled_req_ids.discard(request.request_id)
        self._unreported_preemptions += 1
        self._preempt_request(request, now_s, drop_stale_output=self.requires_kv_delivery)
        self.waiting.remove_request(request)

    def _fills_a_step(self, request: Request) -> bool:
        """Return whether what is left of a job's prompt leaves a step no tokens for the others."""
        if not request.is_prefill_chunk:
            return False
        left = request.num_tokens - request.num_computed_tokens
        return bool(left + len(self.running) > self.max_num_scheduled_tokens)

    def _free_slots(self) -> int:
        # A job that holds KV blocks (it is being restored) is admitted before all others.
        holding = len(self.kv_holding_waiting)
        taken: int = len(self.running) + holding + self.num_waiting_for_streaming_input
        return self.max_num_active_reqs - taken

    def _kv_blocks_left(self) -> int:
        """Return how many KV blocks are free."""
        free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        # Freed ones that a batch in flight may still write come with its end: the candidate gets
        # them in the next step, and nobody else is preempted meanwhile.
        free += sum(len(freed) for _, freed in self.deferred_frees)
        return free - int(self.kv_cache_manager.watermark_blocks)

    def _has_place_for_next(self) -> bool:
        """Return whether the first waiting job waits for a step's tokens, if for anything."""
        needed = self._blocks_of(self.waiting.peek_request())
        return self._free_slots() > 0 and self._kv_blocks_left() >= needed

    def _blocks_of(self, request: Request) -> int:
        return int(request.num_tokens // self.block_size + 1)

    def _frees_s(self) -> list[float]:
        """Return the expected seconds until each running job ends, ascending, where known."""
        left = (self._remaining_s(request) for request in self.running)
        return sorted(seconds for seconds in left if seconds is not None)

    def _remaining_s(self, request: Request) -> float | None:
        tokens = self._jobs[request.request_id].expected_tokens()
        return None if tokens is None else tokens * self._client_costs().decode_s_per_token

    def _is_likely_victim(self, request: Request) -> bool:
        return self._jobs[request.request_id].is_ranked and self._is_preemptible(request)

    def _waiting_jobs(self) -> Iterator[WaitingJob]:
        adapters = {r.lora_request.lora_int_id for r in self.running if r.lora_request}
        for request in self.waiting:
            if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                continue
            if request.lora_request is not None:
                adapter = request.lora_request.lora_int_id
                if adapter not in adapters and len(adapters) >= self.lora_config.max_loras:
                    continue  # vLLM passes over it, too
                adapters.add(adapter)
            record = self._jobs[request.request_id]
            yield WaitingJob(
                job_id=request.request_id,
                key=record.key,
                is_ranked=record.is_ranked,
                remaining_s=self._remaining_s(request),
                blocks=self._blocks_of(request),
            )

    def _running_job(self, request: Request) -> RunningJob:
        record = self._jobs[request.request_id]
        cost_s = request.num_computed_tokens * self._client_costs().prefill_s_per_token
        if self._tier is not None:
            cost_s = preemption_s(self._tier.copy_of(request), self._tier.costs())
        return RunningJob(
            job_id=request.request_id,
            key=record.key,
            is_ranked=record.is_ranked,
            remaining_s=self._remaining_s(request),
            preemption_s=cost_s,
            blocks=request.num_computed_tokens // self.block_size,
            is_preemptible=self._is_preemptible(request),
        )

    def _is_preemptible(self, request: Request) -> bool:
        return bool(request.status == RequestStatus.RUNNING)

    # Events out.

    def _report(self, client: SidecarClient) -> None:
        for request in self.running:
            record = self._jobs[request.request_id]
            if request.num_output_tokens > record.reported_tokens:
                self._events.append(progress(record))
        self._events += self._steps
        self._steps.clear()
        metrics.SIDECAR_CONNECTED.set(client.down_for_s(time.monotonic()) == 0)
        metrics.RANKED_JOBS.set(self._ranked_jobs)
        metrics.LIVE_JOBS.set(len(self._jobs))
        metrics.PREEMPTIONS.inc(self._unreported_preemptions)
        metrics.PREEMPTED_TOKENS.inc(self._unreported_preempted_tokens)
        metrics.RECOMPUTED_TOKENS.inc(self._unreported_recomputed_tokens)
        metrics.ESTIMATES_UNKNOWN.inc(self._unreported_unknown_jobs)
        self._unreported_preemptions = 0
        self._unreported_preempted_tokens = 0
        self._unreported_recomputed_tokens = 0
        self._unreported_unknown_jobs = 0
        if self._tier is not None:
            self._tier.report()

    def _count_recomputed(self, output: SchedulerOutput) -> None:
        """Count what preempted jobs that run again in this step compute anew."""
        scheduled = output.num_scheduled_tokens
        for job_id in [job_id for job_id in self._lost_tokens if job_id in scheduled]:
            restored = self.requests[job_id].num_computed_tokens - scheduled[job_id]
            lost = self._lost_tokens.pop(job_id)
            self._unreported_recomputed_tokens += max(lost - restored, 0)

    def _snapshot(self) -> Snapshot:
        records = list(self._jobs.values())
        for record in records:
            record.reported_tokens = 0
        return Snapshot(
            jobs=[arrived(record) for record in records],
            progress=[progress(record) for record in records if record.request.num_output_tokens],
        )

    def _open_step_of(self, output: SchedulerOutput, now_s: float) -> None:
        """Note what this iteration runs; its duration is known when the next one begins."""
        scheduled = output.num_scheduled_tokens
        if not scheduled or len(self._steps) >= _STEPS_PER_REPORT:
            return
        # With drafts to verify, a decoding job has more than one token.
        drafts = output.scheduled_spec_decode_tokens
        decoding = [n for job_id, n in scheduled.items() if n == 1 or job_id in drafts]
        decode_jobs = len(decoding)
        prefill_tokens = output.total_num_scheduled_tokens - sum(decoding)
        context = sum(self.requests[job_id].num_computed_tokens for job_id in scheduled)
        waiting_jobs = len(self.waiting) + len(self.kv_holding_waiting)
        step = StepTiming(prefill_tokens, decode_jobs, context, 0.0, waiting_jobs=waiting_jobs)
        self._open_step = (now_s, step)

    def _close_step(self, now_s: float) -> None:
        if self._open_step is None:
            return
        began_s, step = self._open_step
        self._open_step = None
        # With batches in flight, they are those of the batch before.
        decoded = step.decode_jobs + self._accepted_drafts if self.num_spec_tokens else 0
        self._accepted_drafts = 0
        # With nobody running, the time since then includes waiting for a request.
        if self.running:
            step_s = now_s - began_s
            self._steps.append(replace(step, duration_s=step_s, decoded_tokens=decoded))
            self._step_s += _STEP_SMOOTHING * (step_s - self._step_s)

    def make_spec_decoding_stats(self, stats: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the drafts that were accepted, and do what vLLM does."""
        self._accepted_drafts += kwargs["num_accepted_tokens"]
        return super().make_spec_decoding_stats(stats, *args, **kwargs)

    def _client_costs(self) -> Costs:
        assert self._client is not None
        return self._client.costs
