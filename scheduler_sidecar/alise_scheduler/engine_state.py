"""All that the sidecar knows of one engine, and one bounded step of work on it.

Knows no gRPC, no clock and no tasks: events go in, updates come out, and the caller decides when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from alise_scheduler.cost_model import CostModel, ServiceRates, moved
from alise_scheduler.estimates import (
    Estimate,
    MeanTokens,
    Pricing,
    by_arrival,
    estimate,
    is_news,
    mean_tokens,
)
from alise_scheduler.events import Arrived, Event, FinishReason, StepTiming
from alise_scheduler.history import HISTORY_JOBS, HISTORY_STEPS, PastJob
from alise_scheduler.jobs import Ended, Job, JobTable
from alise_scheduler.lengths import Quantiles, mean, remaining_after
from alise_scheduler.policy import Policy, PolicyParameters, gamma_for, overdue_s
from alise_scheduler.predictor import Outcome, PromptInput, TrackedJob

PREDICTIONS_PER_STEP: Final = 64
"""Small enough that other engines' events wait only some milliseconds for a step."""
_ESTIMATES_PER_STEP: Final = 256
_OVERDUE_LOOK_S: Final = 1.0
_QUEUE_FORGOTTEN_SHARE: Final = 1 / 256  # with each arrival, of the longest queue
_NOTICEABLE_SHARE: Final = 0.1  # smaller changes of gamma or rates are not worth re-pricing

_OUTCOME_OF: Final = {
    FinishReason.STOP: Outcome.COMPLETE,
    FinishReason.LENGTH: Outcome.CENSORED,
    FinishReason.ABORTED: Outcome.CENSORED,
}


class LengthPredictor(Protocol):
    """What this module asks of a predictor."""

    @property
    def model_version(self) -> int:
        """Grows with each new model; 0 before the first."""

    def track(self, prompt: PromptInput) -> TrackedJob:
        """Begin to follow a job."""

    def encode(self, prompt: PromptInput, job: TrackedJob, then: Callable[[], None]) -> None:
        """Look closer at a prompt in the background; call `then` if there is more to say of it."""

    def predict(self, jobs: Sequence[TrackedJob]) -> Sequence[Quantiles | None]:
        """Return the quantiles of each job's remaining length, tokens; None without a model."""

    def observe(self, job: TrackedJob, outcome: Outcome) -> None:
        """Learn from a job that has ended."""


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What the user chose."""

    policy: Policy = Policy.BOOST
    gamma_per_s: float | None = None
    """None: from the observed service times."""
    aging_s: float = 30.0
    true_tokens_of: Callable[[PromptInput], int | None] = lambda _: None
    """The oracle of benchmarks and tests."""
    first_tokens: int = 0
    """Until so many tokens of its answer are out, a job goes before all that have theirs."""


@dataclass(frozen=True, slots=True)
class Introduction:
    """What an engine says of itself when it connects."""

    model: str = ""
    slots: int = 0
    """Jobs that can run at once; 0: not told."""
    kv_tokens: int = 0
    """KV cache, tokens; 0: not told."""
    block_tokens: int = 0
    batched_tokens: int = 0
    """Of one step at most; 0: not told."""


@dataclass(frozen=True, slots=True)
class Update:
    """What to tell the engine; never empty."""

    model_version: int
    estimates: tuple[Estimate, ...]
    rates: ServiceRates | None
    """Present when they changed."""


@dataclass(slots=True)
class EngineState:
    """One engine's jobs, cost model and gamma; survives a reconnect."""

    predictor: LengthPredictor
    settings: PolicySettings
    table: JobTable = field(init=False)
    cost_model: CostModel = field(default_factory=CostModel)
    pricing: Pricing = field(init=False)
    """In use for all jobs; follows the cost model and gamma when they moved noticeably."""
    introduction: Introduction = Introduction()
    history: deque[PastJob] = field(default_factory=lambda: deque(maxlen=HISTORY_JOBS))
    """The newest jobs that ended, in the order in which they did."""
    clock_ahead_s: float = 0.0
    """The engine's clock minus ours, as of the newest message: off by what that was under way."""
    heard_s: float = 0.0
    """When the newest message was sent, on the engine's clock."""
    # What the shadow has not taken yet; bounded, as nobody may ask.
    _ended: list[PastJob] = field(default_factory=list)
    _steps: deque[StepTiming] = field(default_factory=lambda: deque(maxlen=HISTORY_STEPS))
    _finished: MeanTokens = field(default_factory=MeanTokens)
    _predicted: MeanTokens = field(default_factory=MeanTokens)
    _model_version: int = 0
    _rates_are_news: bool = True
    _waiting_jobs: int = 0
    """In the newest step."""
    _longest_queue_jobs: float = 0.0
    """Of the queues that newcomers met of late."""
    _next_overdue_look_s: float = 0.0

    def __post_init__(self) -> None:
        self.table = JobTable(
            self.predictor.track, self.settings.true_tokens_of, self.predictor.encode
        )
        self._price(PolicyParameters())
        self._model_version = self.predictor.model_version

    def choose(self, settings: PolicySettings) -> None:
        """Go on with other settings; all jobs are priced anew."""
        self.settings = settings
        self._price(self.pricing.parameters)
        self.table.mark_unpriced(self.table.jobs.values())

    def connect(self) -> None:
        """Begin a stream: a snapshot follows, and the engine must be told everything again."""
        self.table.begin_snapshot()
        for job in self.table.jobs.values():
            job.sent = None
        self.table.mark_unpriced(self.table.jobs.values())
        self._rates_are_news = True
        self._next_overdue_look_s = 0.0  # its clock may have begun anew

    def hear(self, sent_s: float, now_s: float) -> None:
        """Note when a message was sent (engine's clock) and received (ours)."""
        self.clock_ahead_s, self.heard_s = sent_s - now_s, sent_s

    def take_past(self) -> tuple[list[PastJob], list[StepTiming]]:
        """Return the jobs and steps that ended since the last call, as far as remembered."""
        taken = self._ended, list(self._steps)
        self._ended = []
        self._steps.clear()
        return taken

    @property
    def mean_service_s(self) -> float | None:
        """How long a job has a slot at the present load, seconds; None before any job was seen."""
        mean_job = mean_tokens(self._finished, self._predicted)
        if mean_job is None:
            return None
        rates = self.cost_model.rates()
        return rates.elapsed_s(mean_job.prompt_tokens, mean_job.output_tokens)

    def apply(self, event: Event) -> Ended | None:
        """Take in one event; returns the job that it ended, if any."""
        if isinstance(event, StepTiming):
            self.cost_model.observe(event)
            self._steps.append(event)
            self._waiting_jobs = event.waiting_jobs
            return None
        ended = self.table.apply(event)
        if isinstance(event, Arrived):
            remembered = (1 - _QUEUE_FORGOTTEN_SHARE) * self._longest_queue_jobs
            self._longest_queue_jobs = max(self._waiting_jobs, remembered)
        if ended is not None:
            self._remember(ended)
            self._learn(ended)
        return ended

    def advance(self) -> Update | None:
        """Do a bounded amount of work; returns what the engine must be told, or None."""
        if self.table.is_in_snapshot:
            return None
        self._follow_pricing()
        self._mark_overdue()
        if self.predictor.model_version != self._model_version:
            self._model_version = self.predictor.model_version
            self.table.mark_all_due()
        self._predict(self.table.take_due(PREDICTIONS_PER_STEP))
        news = self._news(self.table.take_unpriced(_ESTIMATES_PER_STEP))
        rates = self.pricing.rates if self._rates_are_news else None
        self._rates_are_news = False
        if not news and rates is None:
            return None
        return Update(self._model_version, news, rates)

    @property
    def has_work(self) -> bool:
        """Whether `advance` has something to do at once."""
        return self.table.has_work and not self.table.is_in_snapshot

    def _price(self, parameters: PolicyParameters) -> None:
        parameters = replace(parameters, aging_s=self.settings.aging_s)
        if self.settings.gamma_per_s is not None:
            parameters = replace(parameters, gamma_per_s=self.settings.gamma_per_s)
        rates = self.cost_model.rates()
        self.pricing = Pricing(self.settings.policy, parameters, rates, self.settings.first_tokens)

    def _remember(self, ended: Ended) -> None:
        job, event = ended.job, ended.event
        past = PastJob(
            arrival_s=job.arrival_s,
            computed_prompt_tokens=ended.computed_prompt_tokens,
            output_tokens=job.output_tokens,
            finish_s=event.finish_s,
            is_complete=event.reason in (FinishReason.STOP, FinishReason.LENGTH),
        )
        self.history.append(past)
        if len(self._ended) < HISTORY_JOBS:
            self._ended.append(past)

    def _learn(self, ended: Ended) -> None:
        reason, job = ended.event.reason, ended.job
        outcome = _OUTCOME_OF.get(reason)
        if outcome is None or not job.output_tokens:
            return
        if reason is not FinishReason.ABORTED:
            self._finished.observe(ended.computed_prompt_tokens, job.output_tokens)
        self.predictor.observe(job.tracked, outcome)

    def _predict(self, due: list[Job]) -> None:
        unknown = [job for job in due if job.true_tokens is None]
        if unknown:
            answers = self.predictor.predict([job.tracked for job in unknown])
            for job, quantiles in zip(unknown, answers, strict=True):
                if quantiles is not None:
                    if job.quantiles is None:
                        expected_tokens = mean(remaining_after(quantiles, 0))
                        self._predicted.observe(job.uncached_prompt_tokens, expected_tokens)
                    job.set_prediction(quantiles)
        self.table.mark_unpriced(due)

    def _news(self, jobs: list[Job]) -> tuple[Estimate, ...]:
        news = []
        for job in jobs:
            new = estimate(job, self.pricing)
            if new is None and job.sent is not None:
                new = by_arrival(job)  # priced by a policy that is no longer in use
            if new is not None and is_news(new, job.sent, self.pricing.tolerance_s):
                job.sent = new
                news.append(new)
        return tuple(news)

    def _follow_pricing(self) -> None:
        rates, pricing = self.cost_model.rates(), self.pricing
        if self.cost_model.is_fitted and rates.differs_from(pricing.rates, _NOTICEABLE_SHARE):
            pricing = replace(pricing, rates=rates)
            self._rates_are_news = True
        gamma = self._gamma_per_s(pricing)
        if moved(gamma, pricing.parameters.gamma_per_s, _NOTICEABLE_SHARE):
            pricing = replace(pricing, parameters=replace(pricing.parameters, gamma_per_s=gamma))
        if pricing is not self.pricing:
            self.pricing = pricing
            self.table.mark_unpriced(self.table.jobs.values())

    def _gamma_per_s(self, pricing: Pricing) -> float:
        if self.settings.gamma_per_s is not None:
            return self.settings.gamma_per_s
        engine_s = self._mean_engine_s(pricing.rates)
        if engine_s is None:
            return pricing.parameters.gamma_per_s
        # By how many wait, and not by their estimates: it is asked with every batch of news.
        return gamma_for(engine_s, self._waiting_jobs, pricing.rates.decode_jobs)

    def _mean_engine_s(self, rates: ServiceRates) -> float | None:
        mean_job = mean_tokens(self._finished, self._predicted)
        if mean_job is None:
            return None
        return rates.engine_s(mean_job.prompt_tokens, mean_job.output_tokens)

    def _mark_overdue(self) -> None:
        follows_load = self.settings.policy is Policy.BOOST and self.settings.gamma_per_s is None
        if not follows_load or self.heard_s < self._next_overdue_look_s:
            return
        rates = self.pricing.rates
        engine_s = self._mean_engine_s(rates)
        if engine_s is None:
            return
        self._next_overdue_look_s = self.heard_s + _OVERDUE_LOOK_S
        due_s = overdue_s(engine_s, self._longest_queue_jobs, rates.decode_jobs)
        latest_s = self.heard_s - due_s
        overdue = [
            job
            for job in self.table.jobs.values()
            if not job.is_overdue
            and job.arrival_s + rates.service_s(0, job.output_tokens) < latest_s
        ]
        for job in overdue:
            job.is_overdue = True
        self.table.mark_unpriced(overdue)
