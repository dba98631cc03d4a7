"""The sidecar's Prometheus metrics; docs/metrics.md lists the same ones for readers."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter as Tally
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from alise_scheduler.engine_state import EngineState
from alise_scheduler.estimates import backlog_s
from alise_scheduler.shadow import Ratios

if TYPE_CHECKING:
    from alise_scheduler.predictor import Predictor, Quality

_LATENCY_BUCKETS_S: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
_BOOST_BUCKETS_S: Final = (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_JOB_STATES: Final = ("waiting", "running", "preempted")
_JOBS_PER_TURN: Final = 100


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.predictions = Counter(
            "alise_predictions",
            "Predictions by result: quantiles, none (no model yet) or error.",
            ["result"],
            registry=registry,
        )
        self.prediction_latency_s = Histogram(
            "alise_prediction_latency_seconds",
            "Time of one batched call of the predictor.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.tau_b = _gauge(registry, "alise_predictor_tau_b", "Kendall's tau-b, recent jobs.")
        self.mae_tokens = _gauge(
            registry,
            "alise_predictor_mae_tokens",
            "Mean absolute error of the median, recent jobs.",
        )
        self.coverage = Gauge(
            "alise_predictor_coverage_ratio",
            "Share of recent jobs no longer than the predicted quantile.",
            ["quantile"],
            registry=registry,
        )
        self.is_drifting = _gauge(
            registry, "alise_predictor_drifting", "1 while recent jobs are predicted worse."
        )
        self.model_version = _gauge(
            registry, "alise_model_version", "Version of the model in use; 0 before the first."
        )
        self.model_age_s = _gauge(
            registry, "alise_model_age_seconds", "Time since it was trained; 0 before the first."
        )
        self.samples = _gauge(registry, "alise_samples", "Finished jobs stored to learn from.")
        self.encodings = Counter(
            "alise_encodings",
            "Prompts by what the encoder made of them: encoded, or dropped for want of time.",
            ["result"],
            registry=registry,
        )
        self.jobs = Gauge("alise_jobs", "Live jobs.", ["state"], registry=registry)
        self.backlog_s = _gauge(
            registry,
            "alise_backlog_seconds",
            "Predicted service time that jobs without a slot still need.",
        )
        self.finished = Counter(
            "alise_jobs_finished", "Jobs that ended, by reason.", ["reason"], registry=registry
        )
        self.preemptions = Counter(
            "alise_preemptions", "Times that a job lost its slot.", registry=registry
        )
        self.boost_s = Histogram(
            "alise_boost_seconds",
            "Arrival minus priority of the estimates sent, under the policy boost.",
            buckets=_BOOST_BUCKETS_S,
            registry=registry,
        )
        self.gamma_per_s = Gauge(
            "alise_gamma_per_second", "Boost's gamma in use.", ["engine"], registry=registry
        )
        self.cost = Gauge(
            "alise_cost_model_seconds",
            "Coefficients of the step time, and the rates in use.",
            ["engine", "coefficient"],
            registry=registry,
        )
        self.shadow_ratio = Gauge(
            "alise_shadow_ratio",
            "Latency as served over what FCFS would have given the same jobs; below 1 is a gain.",
            ["measure"],
            registry=registry,
        )
        self.shadow_jobs = _gauge(
            registry, "alise_shadow_jobs", "Finished jobs that alise_shadow_ratio compares."
        )
        self.sessions = _gauge(registry, "alise_sessions", "Engines with an open stream.")
        self.events = Counter(
            "alise_events",
            "Events by what came of them: applied, duplicate, unknown or refused.",
            ["result"],
            registry=registry,
        )
        self.rejected = Counter(
            "alise_rejected_calls",
            "Calls and streams ended for breaking the contract, by gRPC status.",
            ["code"],
            registry=registry,
        )
        self.estimates_sent = Counter(
            "alise_estimates_sent", "Estimates sent to engines.", registry=registry
        )

    def count_events(self, tally: Tally[str]) -> None:
        """Add a job table's counts, and start them anew."""
        self.preemptions.inc(tally.pop("preemptions", 0))
        for result, count in tally.items():
            self.events.labels(result).inc(count)
        tally.clear()

    def finished_jobs(self) -> int:
        """Return how many jobs have ended."""
        samples = (s for family in self.finished.collect() for s in family.samples)
        return int(sum(s.value for s in samples if s.name.endswith("_total")))

    def preempted_jobs(self) -> int:
        """Return how many times a job has lost its slot."""
        return int(self.registry.get_sample_value("alise_preemptions_total") or 0)

    async def show_engines(self, engines: Iterable[tuple[str, EngineState]], sessions: int) -> None:
        """Set the gauges that describe the engines now.

        Pricing 10,000 jobs takes a tenth of a second and more: it yields to the streams every
        `_JOBS_PER_TURN` jobs. Each job counts once, as it is when its turn comes.
        """
        shown = list(engines)
        states: Tally[str] = Tally()
        waiting_s = 0.0
        for _, engine in shown:
            rates = engine.pricing.rates
            for index, job in enumerate(list(engine.table.jobs.values()), start=1):
                states[job.state] += 1
                if not job.is_running:
                    waiting_s += backlog_s(job, rates)
                if index % _JOBS_PER_TURN == 0:
                    await asyncio.sleep(0)
        self.gamma_per_s.clear()
        self.cost.clear()
        for name, engine in shown:
            pricing, cost = engine.pricing, engine.cost_model.cost
            self.gamma_per_s.labels(name).set(pricing.parameters.gamma_per_s)
            for coefficient, value_s in (
                ("base", cost.base_s),
                ("prefill_token", cost.prefill_s_per_token),
                ("decode_job", cost.decode_s_per_job),
                ("context_token", cost.context_s_per_token),
                ("rate_prefill_token", pricing.rates.prefill_s_per_token),
                ("rate_decode_token", pricing.rates.decode_s_per_token),
            ):
                self.cost.labels(name, coefficient).set(value_s)
        for state in _JOB_STATES:
            self.jobs.labels(state).set(states[state])
        self.backlog_s.set(waiting_s)
        self.sessions.set(sessions)

    def show_predictor(self, predictor: Predictor, quality: Quality) -> None:
        """Set the gauges that describe the predictor now."""
        self.tau_b.set(quality.tau_b)
        self.mae_tokens.set(quality.mae_tokens)
        self.coverage.labels("p50").set(quality.p50_coverage)
        self.coverage.labels("p90").set(quality.p90_coverage)
        self.is_drifting.set(quality.is_drifting)
        self.model_version.set(predictor.model_version)
        trained_s = predictor.model_trained_unix_s
        self.model_age_s.set(time.time() - trained_s if predictor.model_version else 0)
        self.samples.set(predictor.sample_count)
        if predictor.encoder is not None:
            for result, count in predictor.encoder.take_counts().items():
                self.encodings.labels(result).inc(count)

    def show_shadow(self, ratios: Ratios | None) -> None:
        """Set the gauges that compare with FCFS; NaN before there are enough jobs."""
        self.shadow_jobs.set(ratios.jobs if ratios else 0)
        for measure in ("mean_normalized_latency", "mean_jct", "p99_jct"):
            self.shadow_ratio.labels(measure).set(getattr(ratios, measure) if ratios else math.nan)


def _gauge(registry: CollectorRegistry, name: str, documentation: str) -> Gauge:
    return Gauge(name, documentation, registry=registry)
