"""From a job's predicted length to its priority, and which of these are news to the engine.

Pure. Seconds come from the cost model's rates, order from the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from alise_scheduler.cost_model import ServiceRates
from alise_scheduler.jobs import Job
from alise_scheduler.lengths import mean, remaining_after
from alise_scheduler.policy import (
    PREDICTION_FREE,
    JobView,
    Policy,
    PolicyParameters,
    priority,
    soonest_priority,
)

# An update is news when the priority moved by this share of Boost's time scale 1 / gamma ...
_BOOST_TOLERANCE_SHARE: Final = 0.02
_TOLERANCE_S: Final = 0.05  # of the other policies
# ... or the remaining length is this far from what the engine makes of the last one.
_REMAINING_TOLERANCE_SHARE: Final = 0.25
_REMAINING_TOLERANCE_TOKENS: Final = 4.0

_MEANS_WEIGHT: Final = 1 / 256
_FINISHED_ENOUGH: Final = 32


@dataclass(frozen=True, slots=True)
class Pricing:
    """All that turns lengths into priorities, the same for all jobs of an engine."""

    policy: Policy
    parameters: PolicyParameters
    rates: ServiceRates
    first_tokens: int = 0
    """Until so many tokens of its answer are out, a job goes before all that have theirs."""

    @property
    def tolerance_s(self) -> float:
        """How far a priority may be off before the engine is told."""
        if self.policy in (Policy.BOOST, Policy.BOOST_ATTAINED):
            return _BOOST_TOLERANCE_SHARE / self.parameters.gamma_per_s
        return _TOLERANCE_S


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the engine is told about one job."""

    job_id: str
    priority: float
    remaining_tokens: float
    at_output_tokens: int
    boost_s: float
    """Arrival minus priority."""


def remaining_tokens(job: Job) -> tuple[float, ...]:
    """Return equally likely remaining lengths of `job` (tokens); empty without a prediction."""
    if job.true_tokens is not None:
        return (max(job.true_tokens - job.output_tokens, 1.0),)
    if job.quantiles is None:
        return ()
    points = remaining_after(job.quantiles, job.output_tokens - job.predicted_at_tokens)
    if not job.max_tokens:
        return points
    bound = max(job.max_tokens - job.output_tokens, 1.0)
    return tuple(min(p, bound) for p in points)


def estimate(job: Job, pricing: Pricing) -> Estimate | None:
    """Return the estimate of `job`, or None if there is nothing to go by but its arrival."""
    left_tokens = remaining_tokens(job)
    if not left_tokens and pricing.policy not in PREDICTION_FREE:
        return None
    view = view_of(
        job.arrival_s,
        job.uncached_prompt_tokens,
        left_tokens,
        pricing.rates,
        output_tokens=job.output_tokens,
        is_overdue=job.is_overdue,
    )
    value = place(view, job.output_tokens, pricing)
    expected_tokens = mean(left_tokens) if left_tokens else 0.0
    early_tokens = pricing.first_tokens - job.output_tokens
    if early_tokens > 0:
        expected_tokens = min(expected_tokens, early_tokens) if left_tokens else early_tokens
    return Estimate(
        job_id=job.job_id,
        priority=value,
        remaining_tokens=expected_tokens,
        at_output_tokens=job.output_tokens,
        boost_s=job.arrival_s - value,
    )


def view_of(
    arrival_s: float,
    prompt_tokens: int,
    left_tokens: Sequence[float],
    rates: ServiceRates,
    *,
    output_tokens: int = 0,
    is_overdue: bool = False,
) -> JobView:
    """Return what a policy may know of a job of whose answer `left_tokens` may be left.

    `prompt_tokens` are those that it computes itself.
    """
    prefill_s = rates.service_s(prompt_tokens, 0)
    return JobView(
        arrival_s=arrival_s,
        answer_left_s=tuple([tokens * rates.decode_s_per_token for tokens in left_tokens]),
        attained_s=rates.service_s(prompt_tokens, output_tokens) if output_tokens else 0.0,
        prefill_s=prefill_s,
        prompt_left_s=0.0 if output_tokens else rates.decode_jobs * prefill_s,
        is_overdue=is_overdue,
    )


def place(view: JobView, output_tokens: int, pricing: Pricing) -> float:
    """Return the priority of a job with so many tokens of its answer out."""
    if output_tokens < pricing.first_tokens:
        # All that it asks for now are its first tokens; then it is placed as what it is.
        return soonest_priority(view.arrival_s, pricing.parameters)
    return priority(pricing.policy, view, pricing.parameters)


def by_arrival(job: Job) -> Estimate:
    """Return what takes back an earlier estimate of `job`: its place by arrival."""
    return Estimate(job.job_id, job.arrival_s, 0.0, job.output_tokens, 0.0)


def backlog_s(job: Job, rates: ServiceRates) -> float:
    """Return how long `job` still needs a slot, predicted, seconds; 0 without a prediction.

    Others' prompts between its tokens included, as they keep its slot taken.
    """
    left_tokens = remaining_tokens(job)
    if not left_tokens:
        return 0.0
    return rates.elapsed_s(
        0 if job.output_tokens else job.uncached_prompt_tokens, mean(left_tokens)
    )


def is_news(new: Estimate, sent: Estimate | None, tolerance_s: float) -> bool:
    """Return whether the engine, knowing `sent`, should be told `new`."""
    if sent is None:
        return True
    if abs(new.priority - sent.priority) > tolerance_s:
        return True
    expected = sent.remaining_tokens - (new.at_output_tokens - sent.at_output_tokens)
    slack = max(_REMAINING_TOLERANCE_TOKENS, _REMAINING_TOLERANCE_SHARE * expected)
    return abs(new.remaining_tokens - expected) > slack


@dataclass(slots=True)
class MeanTokens:
    """Running means of prompt and answer lengths: plain at first, then exponentially weighted."""

    count: int = 0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0

    def observe(self, prompt_tokens: float, output_tokens: float) -> None:
        """Add one job."""
        self.count += 1
        weight = max(1 / self.count, _MEANS_WEIGHT)
        self.prompt_tokens += weight * (prompt_tokens - self.prompt_tokens)
        self.output_tokens += weight * (output_tokens - self.output_tokens)


def mean_tokens(finished: MeanTokens, predicted: MeanTokens) -> MeanTokens | None:
    """Return the mean lengths of the finished jobs, or of the predicted until enough have finished.

    None before any job was seen. Lengths are averaged and not seconds, so that a change of the cost
    model applies at once.
    """
    source = finished if finished.count >= _FINISHED_ENOUGH or not predicted.count else predicted
    return source if source.count else None
