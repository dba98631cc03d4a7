"""The queue as a reader wants it: who runs, who waits for how long, and who passed whom.

Pure: copies of what the job table knows go in, rows come out. Instants are seconds on the clock
of the engine that the jobs belong to. Knows nothing of prompts, and of ids only how to shorten
them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Final

from alise_scheduler.cost_model import ServiceRates
from alise_scheduler.estimates import remaining_tokens
from alise_scheduler.jobs import Job
from alise_scheduler.lengths import QUANTILE_LEVELS, mean
from alise_scheduler.waiting import waiting_times

_NAMED_OVERTAKERS: Final = 3
_SHORT_HEAD_CHARS: Final = 8
_SHORT_TAIL_CHARS: Final = 4
_P10, _P50, _P90 = (QUANTILE_LEVELS.index(level) for level in (0.1, 0.5, 0.9))


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What the table knew of one live job at one moment."""

    job_id: str
    state: str
    arrival_s: float
    prompt_tokens: int
    uncached_prompt_tokens: int
    output_tokens: int
    preemptions: int
    priority: float
    """As the engine knows it: its arrival before there is an estimate."""
    remaining_tokens: float | None
    """Of the answer, expected; None without a prediction."""
    length_tokens: tuple[float, float, float] | None
    """p10, p50 and p90 of the answer's whole length."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast one engine works."""

    now_s: float
    slots: int
    """0: not known."""
    rates: ServiceRates
    mean_service_s: float | None
    """What a job without an estimate is taken for."""


@dataclass(frozen=True, slots=True)
class JobRow:
    """One live job beside the others of its engine."""

    facts: JobFacts
    place: int | None
    """In the queue, from 1; None for a job that runs."""
    age_s: float
    """Since the arrival."""
    remaining_s: float | None
    """Service time left at the present load."""
    ewt_s: float | None
    """Until it has a slot; None if it has one, or nothing can be said."""
    overtaken: int
    """Jobs that arrived later and run, stand ahead of it, or have ended."""
    overtakes: int
    """Jobs that arrived earlier and stand behind it."""


def short_id(job_id: str) -> str:
    """Return what may be shown of a job's id: clients choose ids, so little and printable."""
    text = job_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    if len(text) <= _SHORT_HEAD_CHARS + _SHORT_TAIL_CHARS + 1:
        return text
    return f"{text[:_SHORT_HEAD_CHARS]}…{text[-_SHORT_TAIL_CHARS:]}"


def facts_of(job: Job) -> JobFacts:
    """Copy what is shown of `job`; some 10 microseconds."""
    left_tokens = remaining_tokens(job)
    return JobFacts(
        job_id=job.job_id,
        state=job.state,
        arrival_s=job.arrival_s,
        prompt_tokens=job.prompt_tokens,
        uncached_prompt_tokens=job.uncached_prompt_tokens,
        output_tokens=job.output_tokens,
        preemptions=job.preemptions,
        priority=job.arrival_s if job.sent is None else job.sent.priority,
        remaining_tokens=mean(left_tokens) if left_tokens else None,
        length_tokens=_length(job),
    )


def rows(jobs: Iterable[JobFacts], ended_arrivals_s: Iterable[float], pace: Pace) -> list[JobRow]:
    """Return the rows of one engine: what runs, then the queue, each in the order of priority.

    `ended_arrivals_s` are the arrivals of jobs that ended lately.
    """
    ordered = sorted(jobs, key=lambda job: (job.priority, job.arrival_s))
    running = [job for job in ordered if job.state == "running"]
    queue = [job for job in ordered if job.state != "running"]
    ended_s = sorted(ended_arrivals_s)
    running_s = sorted(job.arrival_s for job in running)
    queued_s = sorted(job.arrival_s for job in queue)
    shown = [
        JobRow(
            facts=job,
            place=None,
            age_s=max(pace.now_s - job.arrival_s, 0.0),
            remaining_s=_remaining_s(job, pace.rates),
            ewt_s=None,
            overtaken=0,
            overtakes=bisect_left(queued_s, job.arrival_s),
        )
        for job in running
    ]
    ahead_s: list[float] = []
    for place, (job, ewt_s) in enumerate(
        zip(queue, _waits_s(running, queue, pace), strict=True), start=1
    ):
        at_s = job.arrival_s
        shown.append(
            JobRow(
                facts=job,
                place=place,
                age_s=max(pace.now_s - at_s, 0.0),
                remaining_s=_remaining_s(job, pace.rates),
                ewt_s=ewt_s,
                overtaken=sum(_later(ones, at_s) for ones in (running_s, ahead_s, ended_s)),
                overtakes=bisect_left(queued_s, at_s) - bisect_left(ahead_s, at_s),
            )
        )
        insort(ahead_s, at_s)
    return shown


def overtakers(row: JobRow, engine_rows: Iterable[JobRow]) -> tuple[str, ...]:
    """Return some ids of live jobs that overtook this one, those that run first.

    `engine_rows` are those of its own engine, in their order.
    """
    if not row.overtaken:
        return ()
    ahead = takewhile(lambda other: other is not row, engine_rows)
    later = (r.facts.job_id for r in ahead if r.facts.arrival_s > row.facts.arrival_s)
    return tuple(islice(later, _NAMED_OVERTAKERS))


def wait_before_s(priority: float, engine_rows: Iterable[JobRow], pace: Pace) -> float | None:
    """Return the EWT of a job that came now with this priority, if it preempts nobody.

    None if nothing is known of the lengths before it.
    """
    facts = [row.facts for row in engine_rows]
    running = [job for job in facts if job.state == "running"]
    queue = [job for job in facts if job.state != "running"]
    if not queue and len(running) < pace.slots:
        return 0.0
    ahead = [job for job in queue if job.priority <= priority]
    newcomer = JobFacts("", "waiting", pace.now_s, 0, 0, 0, 0, priority, 1.0, None)
    return _waits_s(running, [*ahead, newcomer], pace)[-1]


def _waits_s(
    running: Sequence[JobFacts], queue: Sequence[JobFacts], pace: Pace
) -> list[float | None]:
    """Return the EWT of each job of the queue; None if nothing is known of lengths."""
    frees_s, works_s = ([_work_s(job, pace) for job in jobs] for jobs in (running, queue))
    if None in frees_s or None in works_s:
        return [None] * len(queue)
    # While jobs wait, slots that stay empty are slots that memory does not allow.
    free_slots = 0 if running else pace.slots
    times = waiting_times([s or 0.0 for s in frees_s], free_slots, [s or 0.0 for s in works_s])
    return [s if math.isfinite(s) else None for s in times]


def _work_s(job: JobFacts, pace: Pace) -> float | None:
    remaining_s = _remaining_s(job, pace.rates)
    return pace.mean_service_s if remaining_s is None else remaining_s


def _remaining_s(job: JobFacts, rates: ServiceRates) -> float | None:
    if job.remaining_tokens is None:
        return None
    return rates.elapsed_s(
        0 if job.output_tokens else job.uncached_prompt_tokens, job.remaining_tokens
    )


def _later(sorted_s: Sequence[float], at_s: float) -> int:
    return len(sorted_s) - bisect_right(sorted_s, at_s)


def _length(job: Job) -> tuple[float, float, float] | None:
    if job.true_tokens is not None:
        return (job.true_tokens,) * 3
    if job.quantiles is None:
        return None
    whole = [max(job.predicted_at_tokens + q, job.output_tokens) for q in job.quantiles]
    return whole[_P10], whole[_P50], whole[_P90]
