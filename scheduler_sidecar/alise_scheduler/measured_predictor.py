"""The predictor as the service uses it: timed, counted, and never fatal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alise_scheduler.lengths import Quantiles
from alise_scheduler.metrics import Metrics
from alise_scheduler.predictor import Outcome, Predictor, PromptInput, TrackedJob

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MeasuredPredictor:
    """Passes calls on; a prediction that fails is no prediction, and those jobs stay FCFS."""

    inner: Predictor
    metrics: Metrics

    @property
    def model_version(self) -> int:
        """The model in use; 0 before the first."""
        return self.inner.model_version

    def track(self, prompt: PromptInput) -> TrackedJob:
        """Begin to follow a job."""
        return self.inner.track(prompt)

    def encode(self, prompt: PromptInput, job: TrackedJob, then: Callable[[], None]) -> None:
        """Have the prompt encoded in the background."""
        try:
            self.inner.encode(prompt, job, then)
        except Exception:  # the estimate by look-ups stands
            _log.exception("a prompt was not encoded")

    def observe(self, job: TrackedJob, outcome: Outcome) -> None:
        """Learn from a job that has ended."""
        self.inner.observe(job, outcome)

    def predict(self, jobs: Sequence[TrackedJob]) -> Sequence[Quantiles | None]:
        """Return remaining-length quantiles; None where there is no model, or it failed."""
        start_s = time.perf_counter()
        try:
            answers = self.inner.predict(jobs)
        except Exception:  # whatever it is, requests go on without predictions
            _log.exception("prediction of %d jobs failed", len(jobs))
            self.metrics.predictions.labels("error").inc(len(jobs))
            return [None] * len(jobs)
        self.metrics.prediction_latency_s.observe(time.perf_counter() - start_s)
        known = sum(answer is not None for answer in answers)
        self.metrics.predictions.labels("quantiles").inc(known)
        self.metrics.predictions.labels("none").inc(len(answers) - known)
        return answers
