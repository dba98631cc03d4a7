"""ALISE on a modelled engine: the sidecar's own state, dispatch and the tier's decisions.

What serves is used as it is: `EngineState` (predictions, cost model, gamma, priorities, what is
news), `dispatch.choose_victims` and `kv_tier.decisions`. Only what ties them to vLLM and to gRPC
is done here in another way, step for step after `AliseScheduler` and `TierSteering`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

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
from alise_engine.kv_tier.decisions import (
    Copy,
    CopyCosts,
    Holding,
    TierParameters,
    choose_evictions,
    is_prefetch_due,
    preemption_s,
    recompute_s,
    swap_s,
)
from alise_scheduler.engine_state import (
    EngineState,
    Introduction,
    LengthPredictor,
    PolicySettings,
)
from alise_scheduler.estimates import Estimate
from alise_scheduler.events import (
    Arrived,
    Finished,
    FinishReason,
    Preempted,
    Progress,
    StepTiming,
)
from alise_scheduler.policy import Policy
from alise_scheduler.predictor import PromptInput
from alise_scheduler.replica import Hardware, Replica, ReplicaJob
from alise_scheduler.waiting import waiting_times

from alise_bench.simulation.predictors import SimulatedPrompt, simulated_prompt
from alise_bench.simulation.profiles import TierSpeed
from alise_bench.simulation.systems import SimulatedSystem
from alise_bench.simulation.workload import RecordedRequest

_REPORT_INTERVAL_S: Final = 0.25
_REPORT_STEPS: Final = 4
_BLOCKED_RETRY_S: Final = 1.0
_VICTIMS_CONSIDERED: Final = 16
_PREFETCHES_CONSIDERED: Final = 4
_WAITING_CONSIDERED: Final = 256
_PREFETCH_FREE_SHARE: Final = 0.1
_SWAP: Final = DispatchParameters(SWAP_MARGIN_S)
_RECOMPUTE: Final = DispatchParameters(RECOMPUTE_MARGIN_S)


@dataclass(slots=True)
class _Record:
    """What the engine remembers of a live job."""

    job: ReplicaJob
    estimate: Estimate | None = None
    reported_tokens: int = 0


class AliseSteering:
    """One engine with its sidecar, under one system of the comparison."""

    def __init__(
        self,
        system: SimulatedSystem,
        hardware: Hardware,
        tier: TierSpeed | None,
        predictor: LengthPredictor,
    ) -> None:
        policy = Policy.FCFS if system.policy is None else system.policy
        settings = PolicySettings(
            policy=policy,
            gamma_per_s=system.gamma_per_s,
            first_tokens=system.first_tokens,
            true_tokens_of=_true_tokens if system.is_oracle else _unknown,
        )
        self._state = EngineState(predictor, settings)
        self._state.introduction = Introduction(slots=hardware.slots)
        self._preempts = system.preempts
        self._tier = tier if system.has_tier else None
        self._hardware = hardware
        self._dispatch = _RECOMPUTE if self._tier is None else _SWAP
        self._parameters = TierParameters()
        self._records: dict[int, _Record] = {}
        self._kept: dict[int, ReplicaJob] = {}
        self._next_report_s = 0.0
        self._no_block_preemption_until_s = 0.0
        self._has_news = False

    # What the replica asks.

    def arrive(self, job: ReplicaJob, _now_s: float) -> float:
        """Tell the sidecar; the order is by arrival until it answers."""
        request = job.request
        ids = request.prompt_ids if isinstance(request, RecordedRequest) else ()
        prompt = simulated_prompt(job.number, request.prompt_tokens, request.output_tokens, ids)
        self._records[job.number] = _Record(job)
        self._state.apply(Arrived(str(job.number), request.arrival_s, prompt))
        self._has_news = True
        return request.arrival_s

    def finish(self, job: ReplicaJob, _now_s: float) -> None:
        """Tell the sidecar."""
        record = self._records.pop(job.number)
        tokens = job.request.output_tokens
        news = self._new_ids(record, tokens)
        self._state.apply(Finished(str(job.number), FinishReason.STOP, tokens, news))
        self._has_news = True

    def steer(self, replica: Replica) -> float:
        """Report progress, take estimates, preempt and prefetch as the engine does in a step."""
        now_s = replica.now_s
        self._state.hear(now_s, now_s)
        if replica.waiting and now_s >= self._next_report_s:
            self._report(replica)
        if self._has_news:
            self._take_estimates(replica)
        if replica.waiting:
            if self._preempts and replica.running:
                self._preempt(replica)
            if replica.free_slots <= len(replica.loading):
                self._prefetch(replica)
        return self._next_report_s if replica.waiting else math.inf

    def keep(self, job: ReplicaJob, context_tokens: int, replica: Replica) -> int:
        """Store what is preempted if that is cheaper than computing it again, and as it fits."""
        self._state.apply(Preempted(str(job.number), replica.output_tokens(job)))
        tier = self._tier
        if tier is None:
            return 0
        copy, costs = Copy(context_tokens, 0), self._costs(tier)
        if swap_s(copy, costs) >= recompute_s(copy, costs):
            return 0
        self._kept = {number: kept for number, kept in self._kept.items() if kept.kept_tokens}
        free = tier.host_tokens - sum(kept.kept_tokens for kept in self._kept.values())
        if free < context_tokens:
            free += self._evict(job, context_tokens - free, replica)
        tokens = min(context_tokens, free)
        self._kept[job.number] = job
        if tier.is_in_step:
            replica.stall(tokens * tier.store_s_per_token)
        return tokens

    def load_s(self, job: ReplicaJob, replica: Replica) -> float:
        """Return how long the copy takes; where copies run in the step, that waits for it."""
        assert self._tier is not None
        seconds = job.kept_tokens * self._tier.load_s_per_token
        if self._tier.is_in_step:
            replica.stall(seconds)
        return seconds

    # What the sidecar is told and says.

    def _report(self, replica: Replica) -> None:
        step_s = replica.step_s()
        self._next_report_s = replica.now_s + max(_REPORT_INTERVAL_S, _REPORT_STEPS * step_s)
        steps = replica.take_steps()
        if steps.steps:
            # Their mean: what a step costs is linear in what runs in it.
            timing = StepTiming(
                prefill_tokens=round(steps.prefill_tokens / steps.steps),
                decode_jobs=round(steps.decode_jobs / steps.steps),
                context_tokens=round(steps.context_tokens / steps.steps),
                duration_s=steps.seconds / steps.steps,
                waiting_jobs=steps.waiting_jobs,
            )
            self._state.apply(timing)
        for job in replica.running.values():
            tokens = replica.output_tokens(job)
            record = self._records[job.number]
            if tokens > record.reported_tokens:
                news = self._new_ids(record, tokens)
                self._state.apply(Progress(str(job.number), tokens, news, True))
                self._has_news = True

    def _new_ids(self, record: _Record, tokens: int) -> Sequence[int]:
        start, record.reported_tokens = record.reported_tokens, tokens
        request = record.job.request
        return request.answer_ids[start:tokens] if isinstance(request, RecordedRequest) else ()

    def _take_estimates(self, replica: Replica) -> None:
        state = self._state
        while True:
            update = state.advance()
            for estimate in update.estimates if update else ():
                record = self._records[int(estimate.job_id)]
                record.estimate = estimate
                if record.job.key != estimate.priority:
                    replica.rank(record.job, estimate.priority)
            if not state.has_work:
                break
        self._has_news = False

    # What dispatch and the tier are asked.

    def _preempt(self, replica: Replica) -> None:
        best = replica.waiting.peekitem(0)[1]
        is_blocked = replica.now_s < self._no_block_preemption_until_s
        blocks = self._hardware.kv_tokens if is_blocked else replica.free_tokens
        is_full = replica.free_slots < 1
        if not is_full and blocks >= self._blocks_of(best, replica):
            return
        worst = max(replica.running.values(), key=_order)
        if is_full and not is_far_behind(_key(worst), _key(best), self._dispatch):
            return
        frees_s = self._frees_s(replica)
        if is_full and frees_s and frees_s[0] <= self._dispatch.margin_s:
            return
        by_order = sorted(replica.running.values(), key=_order, reverse=True)
        running = [self._running_job(job, replica) for job in by_order[:_VICTIMS_CONSIDERED]]
        room = Room(replica.free_slots, blocks, frees_s)
        victims = choose_victims(self._waiting_jobs(replica), running, room, self._dispatch)
        if victims and not is_full:
            self._no_block_preemption_until_s = replica.now_s + _BLOCKED_RETRY_S
        for job_id in victims:
            replica.preempt(replica.running[int(job_id)])

    def _remaining_s(self, job: ReplicaJob, replica: Replica) -> float | None:
        estimate = self._records[job.number].estimate
        if estimate is None:
            return None
        lived = replica.output_tokens(job) - estimate.at_output_tokens
        rate_s = self._state.pricing.rates.decode_s_per_token
        return max(estimate.remaining_tokens - lived, 1.0) * rate_s

    def _frees_s(self, replica: Replica) -> list[float]:
        left = (self._remaining_s(job, replica) for job in replica.running.values())
        return sorted(seconds for seconds in left if seconds is not None)

    def _waiting_jobs(self, replica: Replica) -> Iterator[WaitingJob]:
        for job in replica.waiting.values():
            yield WaitingJob(
                job_id=str(job.number),
                key=_key(job),
                is_ranked=self._records[job.number].estimate is not None,
                remaining_s=self._remaining_s(job, replica),
                blocks=self._blocks_of(job, replica),
            )

    def _blocks_of(self, job: ReplicaJob, replica: Replica) -> int:
        """Return the KV space that admission takes, in the replica's measure: tokens."""
        return replica.context_tokens(job) + self._hardware.block_tokens

    def _running_job(self, job: ReplicaJob, replica: Replica) -> RunningJob:
        context = replica.context_tokens(job)
        if self._tier is None:
            cost_s = context * self._state.pricing.rates.prefill_s_per_token
        else:
            cost_s = preemption_s(Copy(context, 0), self._costs(self._tier))
        return RunningJob(
            job_id=str(job.number),
            key=_key(job),
            is_ranked=self._records[job.number].estimate is not None,
            remaining_s=self._remaining_s(job, replica),
            preemption_s=cost_s,
            blocks=context,
            is_preemptible=True,
        )

    def _costs(self, tier: TierSpeed) -> CopyCosts:
        prefill_s = self._state.pricing.rates.prefill_s_per_token
        return CopyCosts(tier.store_s_per_token, tier.load_s_per_token, prefill_s)

    def _prefetch(self, replica: Replica) -> None:
        if self._tier is None or not self._kept or len(replica.loading) >= _PREFETCHES_CONSIDERED:
            return
        queue = [*replica.loading.values(), *islice(replica.waiting.values(), 4)]
        if not any(job.kept_tokens and not job.is_loading for job in queue):
            return
        spare = _PREFETCH_FREE_SHARE * self._hardware.kv_tokens
        for job, ewt_s in zip(queue, self._times(queue, replica), strict=True):
            load_s = job.kept_tokens * self._tier.load_s_per_token
            if (
                job.kept_tokens
                and not job.is_loading
                and is_prefetch_due(ewt_s, load_s, replica.step_s(), self._parameters)
                and replica.free_tokens - replica.context_tokens(job) >= spare
                and not replica.start_load(job)
            ):
                return

    def _times(self, queue: Sequence[ReplicaJob], replica: Replica) -> list[float]:
        work = (self._remaining_s(job, replica) for job in queue)
        return waiting_times(
            self._frees_s(replica),
            replica.free_slots,
            [math.inf if seconds is None else seconds for seconds in work],
        )

    def _evict(self, job: ReplicaJob, tokens: int, replica: Replica) -> int:
        """Make room in the host tier for `job`, in blocks; return the tokens that were freed."""
        block = self._hardware.block_tokens
        queue = list(islice(replica.waiting.values(), _WAITING_CONSIDERED))
        queue = sorted([*queue, job], key=_order)
        times = {j.number: s for j, s in zip(queue, self._times(queue, replica), strict=True)}
        holdings = [
            Holding(str(number), kept.kept_tokens // block, times.get(number, math.inf))
            for number, kept in self._kept.items()
            if not kept.is_loading
        ]
        freed = 0
        evictions = choose_evictions(holdings, -(-tokens // block), times[job.number])
        for job_id, blocks in evictions:
            kept = self._kept[int(job_id)]
            replica.drop_kept(kept, blocks * block)
            freed += blocks * block
        return freed


def _order(job: ReplicaJob) -> tuple[float, int]:
    return job.order


def _key(job: ReplicaJob) -> OrderKey:
    return (0, job.key, job.number)


def _true_tokens(prompt: PromptInput) -> int | None:
    assert isinstance(prompt, SimulatedPrompt)
    return prompt.output_tokens


def _unknown(prompt: PromptInput) -> int | None:
    del prompt
    return None
