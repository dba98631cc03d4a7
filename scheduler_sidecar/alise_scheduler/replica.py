"""One engine as a discrete-event model: slots, KV space, chunked prefill, continuous batching.

Pure. It knows how long steps take and who fits, not who should go first: a `Steering` orders the
jobs and preempts; without one the order is stock vLLM's, FCFS. `alise simulate` steers it with the
policy, dispatch and KV-tier decisions that serve; the sidecar's shadow lets it run as it is.

Where every step is like the one before (the same jobs, each one token further) many steps are
taken at once, so that the work grows with the number of jobs and not of tokens.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sortedcontainers import SortedDict

from alise_scheduler.cost_model import StepCost


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one replica can do."""

    step: StepCost
    slots: int
    """Sequences that run at once (`--max-num-seqs`)."""
    kv_tokens: int
    """KV cache, tokens."""
    block_tokens: int = 16
    batched_tokens: int = 2048
    """Tokens of a step at most (`--max-num-batched-tokens`)."""


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request: when it comes, and how long prompt and answer are."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """With the end-of-sequence token; at least 1."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request, seconds on the requests' clock."""

    arrival_s: float
    first_token_s: float
    finish_s: float
    output_tokens: int
    longest_gap_s: float
    preemptions: int
    preempted_tokens: int
    recomputed_tokens: int


@dataclass(slots=True, eq=False)
class ReplicaJob:
    """A request on its way. Only the replica changes it, but for what a steering is told to."""

    number: int
    request: SimulatedRequest
    key: float
    """Its place in the queue, lower goes first; changed by `Replica.rank` only."""
    kept_tokens: int = 0
    """Of a preempted job: tokens of context that can be loaded and need not be computed again."""
    is_loading: bool = False
    """Its KV comes back: it has space, but no slot yet."""
    ready_s: float = 0.0
    """When loading ends."""
    cached_tokens: int = 0
    """Of a preempted job: tokens whose KV it left on the device, for the prefix cache to find."""
    evicted_after: int = 0
    """How many tokens the replica will have allocated when that begins to be overwritten."""
    prefill_left: int = 0
    """Tokens to compute before the next one comes out; 0 while it decodes."""
    tokens_before: int = 0
    """Output tokens when it last got a slot, or lost it."""
    decodes_since: int | None = None
    """Step after which it decodes; None while it does not."""
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    """Of a job that is not decoding."""
    finish_s: float = math.nan
    longest_gap_s: float = 0.0
    preemptions: int = 0
    preempted_tokens: int = 0
    recomputed_tokens: int = 0

    @property
    def order(self) -> tuple[float, int]:
        """Its unique place in the queue."""
        return (self.key, self.number)

    @property
    def is_done(self) -> bool:
        """Whether its answer is complete."""
        return not math.isnan(self.finish_s)


class Steering(Protocol):
    """Who orders and preempts. Called between steps, with the replica as it then is."""

    def arrive(self, job: ReplicaJob, now_s: float, /) -> float:
        """Return the key of a job that has just come."""

    def finish(self, job: ReplicaJob, now_s: float) -> None:
        """Take note that a job is done."""

    def steer(self, replica: Replica, /) -> float:
        """Rank, preempt and load as it should be; return when to be asked again, seconds.

        Asked also whenever a job has come or gone.
        """

    def keep(self, job: ReplicaJob, context_tokens: int, replica: Replica, /) -> int:
        """Return how many tokens of a job that loses its slot are kept outside the device."""

    def load_s(self, job: ReplicaJob, replica: Replica, /) -> float:
        """Return how long loading what is kept takes, from now on."""


class FirstComeFirstServed:
    """Stock vLLM: the order of arrival, and nobody preempted but for want of space."""

    def arrive(self, job: ReplicaJob, _now_s: float) -> float:
        """Return the arrival."""
        return job.request.arrival_s

    def finish(self, job: ReplicaJob, now_s: float) -> None:
        """Do nothing."""

    def steer(self, _replica: Replica) -> float:
        """Do nothing, ever."""
        return math.inf

    def keep(self, _job: ReplicaJob, _context_tokens: int, _replica: Replica) -> int:
        """Keep nothing: it is computed again."""
        return 0

    def load_s(self, _job: ReplicaJob, _replica: Replica) -> float:
        """Nothing is ever kept."""
        return 0.0


@dataclass(slots=True)
class StepSums:
    """Steps in sum: what ran in them, and how long they took."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_jobs: int = 0
    context_tokens: int = 0
    seconds: float = 0.0
    waiting_jobs: int = 0
    """In the last of them, not in sum."""


@dataclass(slots=True, eq=False)
class Replica:
    """The state between two steps. `run` drives it."""

    hardware: Hardware
    steering: Steering
    now_s: float = 0.0
    steps: int = 0
    waiting: SortedDict = field(default_factory=SortedDict)  # order -> ReplicaJob
    running: dict[int, ReplicaJob] = field(default_factory=dict)  # number -> job, prefill included
    loading: dict[int, ReplicaJob] = field(default_factory=dict)
    _prefilling: dict[int, ReplicaJob] = field(default_factory=dict)
    _ends: list[tuple[int, int]] = field(default_factory=list)
    """(last step, number) of decoding jobs, as a heap; entries of jobs preempted since are stale"""
    _context_tokens: int = 0  # of decoding jobs
    _reserved_tokens: int = 0  # of prefilling and loading jobs
    _allocated_tokens: int = 0  # ever
    _stall_s: float = 0.0
    _untold: StepSums = field(default_factory=StepSums)
    # Steps that took longer than all steps after them: ascending steps, descending durations.
    _slow_steps: list[int] = field(default_factory=list)
    _slow_s: list[float] = field(default_factory=list)

    # What a steering may ask and do.

    @property
    def free_slots(self) -> int:
        """Return how many jobs could be admitted, for slots."""
        return self.hardware.slots - len(self.running)

    @property
    def free_tokens(self) -> int:
        """Return the KV space that is free, tokens; a job's last block is half full on average."""
        half_blocks = (len(self.running) + len(self.loading)) * self.hardware.block_tokens // 2
        used = self._context_tokens + self._reserved_tokens + half_blocks
        return self.hardware.kv_tokens - used

    def output_tokens(self, job: ReplicaJob) -> int:
        """Return how many tokens have come out."""
        if job.decodes_since is None:
            return job.tokens_before
        return job.tokens_before + self.steps - job.decodes_since

    def context_tokens(self, job: ReplicaJob) -> int:
        """Return prompt and answer so far, tokens."""
        return job.request.prompt_tokens + self.output_tokens(job)

    def rank(self, job: ReplicaJob, key: float) -> None:
        """Give a job another place in the queue."""
        if self.waiting.pop(job.order, None) is not None:
            job.key = key
            self.waiting[job.order] = job
        job.key = key

    def preempt(self, job: ReplicaJob) -> None:
        """Take a running job's slot and KV space; it waits again."""
        context = self.context_tokens(job)
        computed = context - job.prefill_left
        job.cached_tokens = computed
        job.evicted_after = self._allocated_tokens + self.free_tokens
        self._leave(job)
        job.preemptions += 1
        job.preempted_tokens += computed
        job.kept_tokens = min(self.steering.keep(job, context, self), computed)
        job.recomputed_tokens += computed - job.kept_tokens
        self.waiting[job.order] = job

    def drop_kept(self, job: ReplicaJob, tokens: int) -> None:
        """Forget `tokens` from the tail of what is kept of a waiting job."""
        job.kept_tokens -= tokens
        job.recomputed_tokens += tokens

    def start_load(self, job: ReplicaJob) -> bool:
        """Begin to bring a waiting job's KV back; False if there is no space for it."""
        context = self.context_tokens(job)
        if context + self.hardware.block_tokens > self.free_tokens:
            return False
        del self.waiting[job.order]
        job.is_loading = True
        job.ready_s = self.now_s + self.steering.load_s(job, self)
        self._reserved_tokens += context
        self._allocated_tokens += context
        self.loading[job.number] = job
        return True

    def stall(self, seconds: float) -> None:
        """Make the next step take longer by this much."""
        self._stall_s += seconds

    def take_steps(self) -> StepSums:
        """Return the steps since the last call."""
        taken, self._untold = self._untold, StepSums()
        return taken

    def step_s(self) -> float:
        """Return what a step takes at present when nobody is prefilling."""
        decoding = len(self.running) - len(self._prefilling)
        return self.hardware.step.step_s(0, decoding, self._context_tokens)

    # What `run` does.

    def arrive(self, job: ReplicaJob) -> None:
        """Queue a new job."""
        job.key = self.steering.arrive(job, self.now_s)
        self.waiting[job.order] = job

    def admit(self) -> None:
        """Give slots to the best waiting jobs, strictly in order, as far as there is room."""
        for job in [job for job in self.loading.values() if job.ready_s <= self.now_s]:
            if self.free_slots < 1:
                return
            del self.loading[job.number]
            job.is_loading = False
            self._reserved_tokens -= self.context_tokens(job)
            self._enter(job, max(self.context_tokens(job) - job.kept_tokens, 1))
        decoding = len(self.running) - len(self._prefilling)
        budget = self.hardware.batched_tokens - decoding
        budget -= sum(job.prefill_left for job in self._prefilling.values())
        while self.waiting and self.free_slots > 0 and budget > 0:
            job = self.waiting.peekitem(0)[1]
            if job.kept_tokens:
                if len(self.loading) >= self.free_slots or not self.start_load(job):
                    return
                continue
            context = self.context_tokens(job)
            if context + self.hardware.block_tokens > self.free_tokens and self.running:
                return
            del self.waiting[job.order]
            cached = self._cached_tokens(job)
            missing = context - cached
            job.recomputed_tokens -= cached
            self._allocated_tokens += missing
            self._enter(job, missing)
            budget -= missing

    def advance(self, until_s: float) -> list[ReplicaJob]:
        """Run steps until a job ends or `until_s` is reached; return the jobs that ended.

        At least one step if anybody runs; with nobody running, time alone goes by.
        """
        if not self.running:
            ready_s = min((job.ready_s for job in self.loading.values()), default=math.inf)
            self.now_s = max(self.now_s, min(until_s, ready_s))
            return []
        self._make_space()
        steps = 1 if self._prefilling else self._alike_steps(until_s)
        prefilled = self._prefill()
        decoding = len(self.running) - len(self._prefilling)
        first_s = self.hardware.step.step_s(prefilled, decoding, self._context_tokens)
        first_s += self._stall_s
        self._stall_s = 0.0
        growth_s = self.hardware.step.context_s_per_token * decoding
        seconds = steps * first_s + growth_s * steps * (steps - 1) / 2
        untold = self._untold
        untold.steps += steps
        untold.prefill_tokens += prefilled
        untold.decode_jobs += steps * decoding
        untold.context_tokens += steps * self._context_tokens + decoding * steps * (steps - 1) // 2
        untold.seconds += seconds
        untold.waiting_jobs = len(self.waiting)
        self.now_s += seconds
        self.steps += steps
        self._context_tokens += steps * decoding
        self._allocated_tokens += steps * decoding
        self._note_slow_step(first_s + growth_s * (steps - 1))
        ended = self._end_decodes()
        ended += self._end_prefills()
        return ended

    def _alike_steps(self, until_s: float) -> int:
        while not self._is_current(*self._ends[0]):
            heapq.heappop(self._ends)
        steps = self._ends[0][0] - self.steps
        # Space is looked at again well before it runs out.
        steps = min(steps, max(self.free_tokens // len(self.running), 1))
        for job in self.loading.values():
            if job.ready_s > self.now_s:
                until_s = min(until_s, job.ready_s)
        if until_s < math.inf:
            # The fewest n with n first + growth n (n - 1) / 2 >= time: steps become longer.
            time_s = max(until_s - self.now_s - self._stall_s, 0.0)
            growth_s = self.hardware.step.context_s_per_token * len(self.running)
            half = self.step_s() - growth_s / 2
            n = 2 * time_s / (half + math.sqrt(half * half + 2 * growth_s * time_s))
            steps = min(steps, max(math.ceil(n), 1))
        return steps

    def _cached_tokens(self, job: ReplicaJob) -> int:
        """Return how many tokens of a waiting job the prefix cache still has on the device.

        As in vLLM, what was freed first is overwritten first, and of a job its last blocks.
        """
        evicted = max(self._allocated_tokens - job.evicted_after, 0)
        left = min(max(job.cached_tokens - evicted, 0), self.context_tokens(job) - 1)
        return left - left % self.hardware.block_tokens

    def _is_current(self, end: int, number: int) -> bool:
        job = self.running.get(number)
        return job is not None and job.decodes_since is not None and self._end(job) == end

    def _end(self, job: ReplicaJob) -> int:
        """Return the step in which a decoding job's last token comes out."""
        assert job.decodes_since is not None
        return job.decodes_since + job.request.output_tokens - job.tokens_before

    def _make_space(self) -> None:
        # As vLLM: the last one in the order makes room for the others.
        while len(self.running) > 1 and self.free_tokens < len(self.running):
            self.preempt(max(self.running.values(), key=lambda job: job.order))

    def _prefill(self) -> int:
        """Compute the step's share of prompts; return the tokens. A single one is a decode."""
        budget = self.hardware.batched_tokens - (len(self.running) - len(self._prefilling))
        total = 0
        for job in self._prefilling.values():
            tokens = min(job.prefill_left, budget)
            job.prefill_left -= tokens
            budget -= tokens
            total += tokens
        return total

    def _enter(self, job: ReplicaJob, prefill_tokens: int) -> None:
        job.prefill_left = prefill_tokens
        job.kept_tokens = 0
        self.running[job.number] = job
        self._prefilling[job.number] = job
        self._reserved_tokens += self.context_tokens(job)

    def _leave(self, job: ReplicaJob) -> None:
        context = self.context_tokens(job)
        del self.running[job.number]
        if self._prefilling.pop(job.number, None) is not None:
            self._reserved_tokens -= context
            job.prefill_left = 0
            return
        self._context_tokens -= context
        assert job.decodes_since is not None
        job.longest_gap_s = max(job.longest_gap_s, self._slowest_s(job.decodes_since))
        job.tokens_before = self.output_tokens(job)
        job.decodes_since = None
        job.last_token_s = self.now_s

    def _end_decodes(self) -> list[ReplicaJob]:
        ended = []
        while self._ends and self._ends[0][0] <= self.steps:
            end, number = heapq.heappop(self._ends)
            if self._is_current(end, number):
                job = self.running[number]
                self._leave(job)
                ended.append(self._finish(job))
        return ended

    def _end_prefills(self) -> list[ReplicaJob]:
        ended = []
        for job in [job for job in self._prefilling.values() if job.prefill_left == 0]:
            self._reserved_tokens -= self.context_tokens(job)
            del self._prefilling[job.number]
            job.tokens_before += 1
            if math.isnan(job.first_token_s):
                job.first_token_s = self.now_s
            else:
                job.longest_gap_s = max(job.longest_gap_s, self.now_s - job.last_token_s)
            if job.tokens_before >= job.request.output_tokens:
                del self.running[job.number]
                ended.append(self._finish(job))
                continue
            job.decodes_since = self.steps
            self._context_tokens += self.context_tokens(job)
            heapq.heappush(self._ends, (self._end(job), job.number))
        return ended

    def _finish(self, job: ReplicaJob) -> ReplicaJob:
        job.finish_s = self.now_s
        self.steering.finish(job, self.now_s)
        return job

    def _note_slow_step(self, seconds: float) -> None:
        while self._slow_s and self._slow_s[-1] <= seconds:
            self._slow_s.pop()
            self._slow_steps.pop()
        self._slow_s.append(seconds)
        self._slow_steps.append(self.steps)

    def _slowest_s(self, since: int) -> float:
        """Return the longest step after step `since`, seconds."""
        index = bisect_left(self._slow_steps, since + 1)
        return self._slow_s[index] if index < len(self._slow_s) else 0.0


def replay(
    requests: Sequence[SimulatedRequest],
    hardware: Hardware,
    steering: Steering | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Return what becomes of `requests` (ascending by arrival) on one replica, in their order.

    `on_progress` is told the number of finished requests as it grows. Raises ValueError for a
    request that no replica of this kind can hold.
    """
    for number, request in enumerate(requests):
        needed = request.prompt_tokens + request.output_tokens + hardware.block_tokens
        if needed > hardware.kv_tokens:
            raise ValueError(
                f"request {number} needs {needed} tokens of KV cache, and there are "
                f"{hardware.kv_tokens}: leave it out, or give the profile more"
            )
    replica = Replica(hardware, steering or FirstComeFirstServed())
    jobs = [
        ReplicaJob(number, request, request.arrival_s) for number, request in enumerate(requests)
    ]
    come, done = 0, 0
    while done < len(jobs):
        while come < len(jobs) and jobs[come].request.arrival_s <= replica.now_s:
            replica.arrive(jobs[come])
            come += 1
        again_s = replica.steering.steer(replica)
        replica.admit()
        # A new job changes nothing for the others while all slots are taken and nobody preempts.
        if come < len(jobs) and (steering or replica.free_slots > 0):
            again_s = min(again_s, jobs[come].request.arrival_s)
        ended = replica.advance(again_s)
        if ended:
            done += len(ended)
            on_progress(done)
    return [_outcome(job) for job in jobs]


def _outcome(job: ReplicaJob) -> Outcome:
    return Outcome(
        arrival_s=job.request.arrival_s,
        first_token_s=job.first_token_s,
        finish_s=job.finish_s,
        output_tokens=job.request.output_tokens,
        longest_gap_s=job.longest_gap_s,
        preemptions=job.preemptions,
        preempted_tokens=job.preempted_tokens,
        recomputed_tokens=job.recomputed_tokens,
    )
