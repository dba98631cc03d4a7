"""The policy: what a job's estimate makes of its priority. Lower goes first.

Pure. Every policy is a function from one job's state to one number, comparable between jobs, so
that an ordered queue is all that the engine needs. A job without an estimate keeps its arrival
as priority (those of `PREDICTION_FREE` need none): without a predictor the order is FCFS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias


class Policy(str, Enum):
    """The policies by the names that users give on the command line."""

    BOOST = "boost"
    BOOST_ATTAINED = "boost-attained"
    SRTF = "srtf"
    SRTF_AGING = "srtf-aging"
    MLFQ = "mlfq"
    FCFS = "fcfs"


@dataclass(frozen=True, slots=True)
class JobView:
    """What a policy may know of one job. Seconds of a slot."""

    arrival_s: float
    """On the engine's clock."""
    answer_left_s: tuple[float, ...]
    """Equally likely times that the rest of its answer takes, ascending; empty when there is no
    estimate."""
    attained_s: float = 0.0
    """Service received so far: its prompt's own time and its answer's."""
    prefill_s: float = 0.0
    """The prompt's own time: MLFQ's skip-join sorts new jobs by it."""
    prompt_left_s: float = 0.0
    """What computing its prompt takes from all slots together, as all wait for it; 0 afterwards."""
    is_overdue: bool = False
    """Boost: it has waited too long (`overdue_s`)."""


@dataclass(frozen=True, slots=True)
class PolicyParameters:
    """Tunables; the defaults are for a mean service time of about 10 s."""

    gamma_per_s: float = 0.05
    """Boost: 0 orders by remaining work alone, infinity by arrival."""
    least_work_s: float = 0.05
    """Work below this counts as this much: it bounds the largest boost."""
    aging_s: float = 30.0
    """SRTF with aging: a wait this long makes up for e times the work."""
    mlfq_quantum_s: float = 1.0
    """Quantum of the first queue; each next one has twice as much."""
    mlfq_levels: int = 8


QUEUE_SHARE: Final = 1.2
_USUAL_QUEUE_JOBS: Final = 16.0  # 1 / (1 - utilization): M/G/k's mean one, if there is any, at 0.94
OVERDUE_WAITS: Final = 1.3
_OVERDUE_WORK_SHARE: Final = 0.07
_MLFQ_LEVEL_S: Final = 1e6  # far above any difference between arrivals in one queue


def usual_queue_jobs(batch_jobs: float) -> float:
    """Return how long a queue counts as usual where so many jobs share a step.

    As many as run, while they are few: they wait at lower loads, too, in shorter queues.
    """
    return min(max(batch_jobs, 1.0), _USUAL_QUEUE_JOBS)


def gamma_for(engine_s: float, waiting_jobs: float, batch_jobs: float) -> float:
    """Return Boost's gamma (1/s), for the engine's time that a job takes and the queue's length.

    What overtaking adds to the tail is about as long as 1 / gamma, so that must be on the scale of
    the waits that there are anyway: of the queue that a busy but stable engine has, or of the one
    that is there now, if it is longer, as in overload. A queue takes its length times what a job
    takes of the engine (`ServiceRates.engine_s`), whether slots, tokens or memory bound it. The
    numbers were chosen by simulation (docs/policy.md).
    """
    usual_jobs = usual_queue_jobs(batch_jobs)
    longer_jobs = max(waiting_jobs - usual_jobs, 0.0)
    return 1 / max(engine_s * (usual_jobs + QUEUE_SHARE * longer_jobs), 1e-3)


def overdue_s(engine_s: float, longest_queue_jobs: float, batch_jobs: float) -> float:
    """Return how long (s) a job may wait in all before it is overdue.

    That is the longest wait of FCFS, by the queues that newcomers met of late, and somewhat more,
    by which short jobs go on gaining in a lasting overload, where all wait about as long.
    """
    return max(OVERDUE_WAITS * longest_queue_jobs, usual_queue_jobs(batch_jobs)) * engine_s


def boost_s(work_s: float, gamma_per_s: float) -> float:
    """Return the boost of a job with known work: -ln(1 - exp(-gamma s)) / gamma, seconds.

    Yu and Scully, "Strongly tail-optimal scheduling in the light-tailed M/G/1" (2024).
    """
    return -math.log(-math.expm1(-gamma_per_s * work_s)) / gamma_per_s


def effective_work_s(
    left_s: Sequence[float], least_work_s: float, *, before_s: float = 0.0, had_s: float = 0.0
) -> float:
    """Return the certain work that ranks as equally likely, ascending amounts do, seconds.

    `left_s` is what may be left of the job itself, `had_s` what it has had; `before_s` is what
    others lose by it first, while its prompt is computed. Gittins' index (Gittins, Glazebrook and
    Weber, "Multi-armed Bandit Allocation Indices", 2011) for the mean slowdown, in which a job of s
    in all counts 1/s (of the answer alone: for the mean normalized latency): of all d, serve for
    the d that maximizes E[1/s if it ends by d] / E[what it takes until d]. For a certain s, all of
    it to come, that is 1/s^2, so the work is the index to the power of -1/2. A long job that may
    well turn out short goes early, until it has outlived that.
    """
    best = gain = 0.0
    unended = len(left_s)
    ended_s = unended * before_s
    for value_s in left_s:
        end_s = value_s if value_s > least_work_s else least_work_s
        gain += 1 / (had_s + end_s)
        ended_s += end_s
        unended -= 1
        index = gain / (ended_s + unended * end_s)
        if index > best:
            best = index
    return 1 / math.sqrt(best)


def starvation_bound_s(parameters: PolicyParameters, work_s: float) -> float:
    """Return how long after a job with `work_s` another may arrive and still overtake it.

    boost(least work) - boost(own work): no later arrival has a lower Boost priority.
    """
    gamma, least = parameters.gamma_per_s, parameters.least_work_s
    return boost_s(least, gamma) - boost_s(max(work_s, least), gamma)


def _boost(job: JobView, parameters: PolicyParameters) -> float:
    work_s = effective_work_s(
        job.answer_left_s,
        parameters.least_work_s,
        before_s=job.prompt_left_s,
        had_s=max(job.attained_s, job.prefill_s),
    )
    if job.is_overdue:
        # Before nearly all that came later: the very shortest pass, which costs it hardly anything.
        work_s = min(work_s, _OVERDUE_WORK_SHARE / parameters.gamma_per_s)
    return job.arrival_s - boost_s(max(work_s, parameters.least_work_s), parameters.gamma_per_s)


def _boost_attained(job: JobView, parameters: PolicyParameters) -> float:
    # UniBoost ("Beyond Prediction: Tail-Aware Scheduling for LLM Inference", ICML 2026) boosts by
    # what is known: the prompt that is to be computed, and the service that was had.
    known_s = max(job.prefill_s, job.attained_s, parameters.least_work_s)
    return job.arrival_s - boost_s(known_s, parameters.gamma_per_s)


def soonest_priority(arrival_s: float, parameters: PolicyParameters) -> float:
    """Return the priority of a job that is to go before all later ones: the largest boost.

    It is the one of a job with the least work, so that the bound on starvation holds.
    """
    return arrival_s - boost_s(parameters.least_work_s, parameters.gamma_per_s)


def _mean_remaining_s(job: JobView, parameters: PolicyParameters) -> float:
    answer_s = sum(job.answer_left_s) / len(job.answer_left_s)
    return max(job.prompt_left_s + answer_s, parameters.least_work_s)


def _srtf_aging(job: JobView, parameters: PolicyParameters) -> float:
    # Ordering by remaining * exp(-wait / aging) is ordering by arrival + aging * ln(remaining):
    # `now` adds the same to every job, so a waiting job's priority need not be refreshed.
    return job.arrival_s + parameters.aging_s * math.log(_mean_remaining_s(job, parameters))


def mlfq_level(job: JobView, parameters: PolicyParameters) -> int:
    """Return the queue (0 is first) of skip-join MLFQ (FastServe, Wu et al. 2023).

    A new job joins the first queue whose quantum covers its prompt; it moves down as the service
    that it has had exceeds the quanta of the queues above. No lengths are predicted.
    """
    level, quantum, used = 0, parameters.mlfq_quantum_s, 0.0
    while level < parameters.mlfq_levels - 1 and (
        quantum < job.prefill_s or used + quantum <= job.attained_s
    ):
        used += quantum
        quantum *= 2
        level += 1
    return level


def _mlfq(job: JobView, parameters: PolicyParameters) -> float:
    return mlfq_level(job, parameters) * _MLFQ_LEVEL_S + job.arrival_s


def _fcfs(job: JobView, _: PolicyParameters) -> float:
    return job.arrival_s


PriorityOf: TypeAlias = Callable[[JobView, PolicyParameters], float]

_PRIORITY_OF: Final[dict[Policy, PriorityOf]] = {
    Policy.BOOST: _boost,
    Policy.BOOST_ATTAINED: _boost_attained,
    Policy.SRTF: _mean_remaining_s,
    Policy.SRTF_AGING: _srtf_aging,
    Policy.MLFQ: _mlfq,
    Policy.FCFS: _fcfs,
}


PREDICTION_FREE: Final = frozenset({Policy.MLFQ, Policy.BOOST_ATTAINED})
"""Policies that order jobs without an estimate, too."""


def priority(policy: Policy, job: JobView, parameters: PolicyParameters) -> float:
    """Return the priority of `job` under `policy`: a finite number, lower goes first."""
    if not job.answer_left_s and policy not in PREDICTION_FREE:
        return job.arrival_s
    return _PRIORITY_OF[policy](job, parameters)
