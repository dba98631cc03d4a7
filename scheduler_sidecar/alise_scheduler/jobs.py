"""The jobs of one engine: who lives, how far each is, and who needs a new prediction.

Pure, and knows neither predictions' makers nor priorities. Whatever is told twice, late or about
jobs that nobody announced changes nothing, and is counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from alise_scheduler.events import (
    Arrived,
    Event,
    Finished,
    Preempted,
    Progress,
    SnapshotEnd,
)
from alise_scheduler.lengths import Quantiles
from alise_scheduler.protocol import MAX_LIVE_JOBS

if TYPE_CHECKING:
    from alise_scheduler.estimates import Estimate
    from alise_scheduler.predictor import PromptInput, TrackedJob

_MILESTONES: Final = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_MILESTONE_STEP: Final = 512  # after the last
_OUTLIVED_STEP_TOKENS: Final = 8
_REMEMBERED_FINISHED: Final = 8192


def next_milestone(output_tokens: int) -> int:
    """Return the answer length, above `output_tokens`, at which to predict again."""
    index = bisect_right(_MILESTONES, output_tokens)
    if index < len(_MILESTONES):
        return _MILESTONES[index]
    return (output_tokens // _MILESTONE_STEP + 1) * _MILESTONE_STEP


@dataclass(slots=True, eq=False)
class Job:
    """One live job."""

    job_id: str
    arrival_s: float
    prompt_tokens: int
    uncached_prompt_tokens: int
    """What of them is to be computed, by the prefix cache at its arrival; at least 1."""
    max_tokens: int
    """Bound of the answer's length; 0 when there is none."""
    tracked: TrackedJob
    """The predictor's own view of it, fed with the answer as it comes out."""
    true_tokens: int | None = None
    """The answer's length if an oracle knows it."""
    output_tokens: int = 0
    is_running: bool = False
    is_overdue: bool = False
    """It has waited so long that it goes before nearly all younger ones, from now on."""
    preempted_at_tokens: int | None = None
    """Set while the job is out of its slot after having had one."""
    preemptions: int = 0
    quantiles: Quantiles | None = None
    """Of the length that was to come at `predicted_at_tokens`."""
    predicted_at_tokens: int = 0
    repredict_at_tokens: int = _MILESTONES[0]
    sent: Estimate | None = None

    @property
    def state(self) -> str:
        """Return "running", "preempted" or "waiting"."""
        if self.is_running:
            return "running"
        return "waiting" if self.preempted_at_tokens is None else "preempted"

    def set_prediction(self, quantiles: Quantiles) -> None:
        """Take a prediction of the remaining length made at the present length."""
        self.quantiles = quantiles
        self.predicted_at_tokens = self.output_tokens
        outlived = self.output_tokens + max(_OUTLIVED_STEP_TOKENS, int(quantiles[-1]) + 1)
        self.repredict_at_tokens = min(next_milestone(self.output_tokens), outlived)


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has just left the table by finishing."""

    job: Job
    event: Finished

    @property
    def computed_prompt_tokens(self) -> int:
        """Return what of its prompt was not found in the prefix cache, at least 1."""
        return max(self.job.prompt_tokens - self.event.cached_prompt_tokens, 1)


@dataclass(slots=True)
class JobTable:
    """Live jobs by id, and the two queues of work on them."""

    track: Callable[[PromptInput], TrackedJob]
    true_tokens_of: Callable[[PromptInput], int | None] = lambda _: None
    encode: Callable[[PromptInput, TrackedJob, Callable[[], None]], None] = lambda *_: None
    """Asked of each arrival; calls back when it is to be predicted again."""
    max_jobs: int = MAX_LIVE_JOBS
    jobs: dict[str, Job] = field(default_factory=dict)
    tally: Counter[str] = field(default_factory=Counter)
    """Events by what came of them: applied, duplicate, unknown, refused; and preemptions."""
    # Ordered sets of job ids. Arrivals first: they wait for their place in the queue.
    _due_arrivals: dict[str, None] = field(default_factory=dict)
    _due_others: dict[str, None] = field(default_factory=dict)
    _unpriced: dict[str, None] = field(default_factory=dict)
    _named: set[str] | None = None  # jobs that an unfinished snapshot has named
    _finished: OrderedDict[str, float] = field(default_factory=OrderedDict)  # job_id -> arrival_s

    def begin_snapshot(self) -> None:
        """Expect the names of all live jobs: at its end, jobs that were not named are dropped."""
        self._named = set()

    @property
    def is_in_snapshot(self) -> bool:
        """Whether a snapshot has begun and not ended."""
        return self._named is not None

    def apply(self, event: Event) -> Ended | None:
        """Apply one event; returns the job that it ended, if any."""
        if isinstance(event, Arrived):
            self._arrive(event)
        elif isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Preempted):
            self._preempt(event)
        elif isinstance(event, Finished):
            return self._finish(event)
        elif isinstance(event, SnapshotEnd):
            self._end_snapshot()
        return None

    def take_due(self, limit: int) -> list[Job]:
        """Remove and return up to `limit` jobs that need a prediction, arrivals first."""
        taken = _take(self._due_arrivals, limit)
        taken += _take(self._due_others, limit - len(taken))
        return [self.jobs[job_id] for job_id in taken]

    def take_unpriced(self, limit: int) -> list[Job]:
        """Remove and return up to `limit` jobs whose priority may have changed."""
        return [self.jobs[job_id] for job_id in _take(self._unpriced, limit)]

    def mark_unpriced(self, jobs: Iterable[Job]) -> None:
        """Note that the priorities of `jobs` may have changed."""
        self._unpriced.update((job.job_id, None) for job in jobs)

    def mark_all_due(self) -> None:
        """Note that every job needs a new prediction."""
        self._due_others.update(dict.fromkeys(self.jobs.keys() - self._due_arrivals.keys()))

    @property
    def has_work(self) -> bool:
        """Whether a job waits for a prediction or a priority."""
        return bool(self._due_arrivals or self._due_others or self._unpriced)

    def _arrive(self, event: Arrived) -> None:
        if self._named is not None:
            self._named.add(event.job_id)
        elif self._finished.get(event.job_id) == event.arrival_s:
            self.tally["duplicate"] += 1
            return
        if event.job_id in self.jobs:
            self.tally["applied" if self._named is not None else "duplicate"] += 1
            return
        if len(self.jobs) >= self.max_jobs:
            self.tally["refused"] += 1
            return
        self.tally["applied"] += 1
        prompt = event.prompt
        tracked = self.track(prompt)
        self.jobs[event.job_id] = Job(
            job_id=event.job_id,
            arrival_s=event.arrival_s,
            prompt_tokens=prompt.prompt_tokens,
            uncached_prompt_tokens=max(prompt.prompt_tokens - event.cached_prompt_tokens, 1),
            max_tokens=prompt.max_tokens,
            tracked=tracked,
            true_tokens=self.true_tokens_of(prompt),
        )
        self._due_arrivals[event.job_id] = None
        self.encode(prompt, tracked, partial(self._encoded, event.job_id))

    def _encoded(self, job_id: str) -> None:
        if job_id in self.jobs and job_id not in self._due_arrivals:
            self._due_others[job_id] = None

    def _progress(self, event: Progress) -> None:
        job = self._known(event.job_id)
        if job is None:
            return
        if event.output_tokens < job.output_tokens:
            self.tally["duplicate"] += 1
            return
        if event.output_tokens == job.output_tokens and event.is_running == job.is_running:
            self.tally["duplicate"] += 1
            return
        self.tally["applied"] += 1
        job.is_running = event.is_running
        if event.is_running:
            job.preempted_at_tokens = None
        if self._grow(job, event.new_token_ids, event.output_tokens):
            self._unpriced[job.job_id] = None
            if job.output_tokens >= job.repredict_at_tokens:
                job.repredict_at_tokens = next_milestone(job.output_tokens)
                self._due_others[job.job_id] = None

    def _preempt(self, event: Preempted) -> None:
        job = self._known(event.job_id)
        if job is None:
            return
        if event.output_tokens < job.output_tokens or (
            job.preempted_at_tokens is not None and job.preempted_at_tokens >= event.output_tokens
        ):
            self.tally["duplicate"] += 1
            return
        self.tally["applied"] += 1
        self.tally["preemptions"] += 1
        job.is_running = False
        job.preemptions += 1
        job.preempted_at_tokens = event.output_tokens

    def _finish(self, event: Finished) -> Ended | None:
        job = self._known(event.job_id)
        if job is None:
            return None
        self.tally["applied"] += 1
        self._grow(job, event.new_token_ids, event.output_tokens)
        self._drop(job.job_id)
        self._finished[job.job_id] = job.arrival_s
        if len(self._finished) > _REMEMBERED_FINISHED:
            self._finished.popitem(last=False)
        return Ended(job, event)

    def _end_snapshot(self) -> None:
        if self._named is None:
            return
        for job_id in self.jobs.keys() - self._named:
            self._drop(job_id)
        self._named = None

    def _known(self, job_id: str) -> Job | None:
        job = self.jobs.get(job_id)
        if job is None:
            self.tally["duplicate" if job_id in self._finished else "unknown"] += 1
        return job

    @staticmethod
    def _grow(job: Job, new_token_ids: Sequence[int], output_tokens: int) -> bool:
        """Take in the ids that the job does not have yet; returns whether there were tokens."""
        fresh = output_tokens - job.output_tokens
        if fresh <= 0:
            return False
        job.output_tokens = output_tokens
        job.tracked.extend(new_token_ids[-fresh:], output_tokens)
        return True

    def _drop(self, job_id: str) -> None:
        del self.jobs[job_id]
        for queue in (self._due_arrivals, self._due_others, self._unpriced):
            queue.pop(job_id, None)


def _take(queue: dict[str, None], limit: int) -> list[str]:
    taken = [job_id for job_id, _ in zip(queue, range(limit), strict=False)]
    for job_id in taken:
        del queue[job_id]
    return taken
