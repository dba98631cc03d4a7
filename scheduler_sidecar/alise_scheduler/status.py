"""What the sidecar is doing now, as one document: for the status page, `alise top` and scripts.

Pure: facts in, a JSON-able document out. It says nothing of prompts and answers, and shortens job
ids. docs/status.md describes the document for readers; its path carries the version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from alise_scheduler.cost_model import StepCost
from alise_scheduler.estimates import Pricing, place, view_of
from alise_scheduler.lengths import Quantiles, mean, remaining_after
from alise_scheduler.predictor import PromptInput, Quality
from alise_scheduler.queue_view import (
    JobFacts,
    JobRow,
    Pace,
    overtakers,
    rows,
    short_id,
    wait_before_s,
)
from alise_scheduler.shadow import Ratios

STATES: Final = ("running", "waiting", "preempted")
MAX_PAGE_JOBS: Final = 500
MAX_SEARCH_CHARS: Final = 64


class QueryError(ValueError):
    """A parameter has a value that is not allowed; the text says which are."""


@dataclass(frozen=True, slots=True)
class Query:
    """Which jobs to list."""

    states: tuple[str, ...] = STATES
    search: str = ""
    """Part of a job's id, in any case."""
    offset: int = 0
    limit: int = 50

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Query:
        """Read it from the parameters of a URL; raises `QueryError`."""
        unknown = parameters.keys() - {"state", "search", "offset", "limit"}
        if unknown:
            raise QueryError(
                f"unknown parameter {min(unknown)!r}: allowed are state, search, offset and limit"
            )
        state = parameters.get("state", "")
        if state and state not in (*STATES, "queued"):
            raise QueryError(f"state={state!r}: allowed are {', '.join(STATES)} and queued")
        search = parameters.get("search", "")
        if len(search) > MAX_SEARCH_CHARS:
            raise QueryError(f"search has {len(search)} characters; allowed are {MAX_SEARCH_CHARS}")
        states = ("waiting", "preempted") if state == "queued" else (state,) if state else STATES
        return cls(
            states=states,
            search=search.lower(),
            offset=_number(parameters, "offset", 0, 0, 10_000_000),
            limit=_number(parameters, "limit", 50, 0, MAX_PAGE_JOBS),
        )


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine at one moment."""

    engine_id: str
    model: str
    is_connected: bool
    pace: Pace
    pricing: Pricing
    cost: StepCost
    jobs: Sequence[JobFacts]
    ended_arrivals_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class PredictorFacts:
    """The predictor at one moment."""

    model_version: int
    trained_unix_s: float
    samples: int
    quality: Quality


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a status is made of."""

    version: str
    policy: str
    engines: Sequence[EngineFacts]
    predictor: PredictorFacts
    finished: int
    preemptions: int
    """Both since the sidecar started."""
    shadow: Ratios | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """What a job has before it, seconds."""

    wait_s: float
    service_s: float
    """Its own time once it has a slot, at the present load."""


@dataclass(frozen=True, slots=True)
class Status:
    """Facts, and the queues worked out of them: any number of pages are cut from one."""

    facts: Facts
    rows: Sequence[Sequence[JobRow]]
    """Of each engine."""

    @classmethod
    def of(cls, facts: Facts) -> Status:
        """Work out the queues; some 10 microseconds a job."""
        return cls(facts, [rows(e.jobs, e.ended_arrivals_s, e.pace) for e in facts.engines])

    def times_of(self, prompt: PromptInput, quantiles: Quantiles) -> Times | None:
        """Say what would meet a job of this predicted length that came now.

        At the engine where it would have a slot soonest; None if that cannot be said.
        """
        times = [
            _times_at(engine, engine_rows, prompt, quantiles)
            for engine, engine_rows in zip(self.facts.engines, self.rows, strict=True)
            if engine.is_connected
        ]
        return min((t for t in times if t is not None), key=lambda t: t.wait_s, default=None)

    def document(self, query: Query) -> dict[str, Any]:
        """Return the document with one page of jobs."""
        facts = self.facts
        matching = [
            (engine, row, engine_rows)
            for engine, engine_rows in zip(facts.engines, self.rows, strict=True)
            for row in engine_rows
            if row.facts.state in query.states and query.search in row.facts.job_id.lower()
        ]
        page = matching[query.offset : query.offset + query.limit]
        return {
            "version": facts.version,
            "policy": facts.policy,
            "engines": [
                _engine(engine, engine_rows)
                for engine, engine_rows in zip(facts.engines, self.rows, strict=True)
            ],
            "predictor": _predictor(facts.predictor),
            "shadow": _shadow(facts.shadow),
            "since_start": {"finished": facts.finished, "preemptions": facts.preemptions},
            "jobs": {
                **_count(row for engine_rows in self.rows for row in engine_rows),
                "matching": len(matching),
                "offset": query.offset,
                "rows": [_job(engine, row, others) for engine, row, others in page],
            },
        }


def _times_at(
    engine: EngineFacts, engine_rows: Sequence[JobRow], prompt: PromptInput, quantiles: Quantiles
) -> Times | None:
    points = remaining_after(quantiles, 0)
    pace, pricing = engine.pace, engine.pricing
    view = view_of(pace.now_s, prompt.prompt_tokens, points, pricing.rates)
    wait_s = wait_before_s(place(view, 0, pricing), engine_rows, pace)
    if wait_s is None:
        return None
    return Times(wait_s, pace.rates.elapsed_s(prompt.prompt_tokens, mean(points)))


def _engine(engine: EngineFacts, engine_rows: Sequence[JobRow]) -> dict[str, Any]:
    queue = [row for row in engine_rows if row.place is not None]
    return {
        "id": short_id(engine.engine_id),
        "model": engine.model,
        "is_connected": engine.is_connected,
        "slots": engine.pace.slots or None,
        **_count(engine_rows),
        "backlog_s": _rounded(sum(row.remaining_s or 0.0 for row in queue)),
        "longest_wait_s": _rounded(max((row.age_s for row in queue), default=0.0)),
        "gamma_per_s": _rounded(engine.pricing.parameters.gamma_per_s, 6),
        "prefill_s_per_token": _rounded(engine.pace.rates.prefill_s_per_token, 9),
        "decode_s_per_token": _rounded(engine.pace.rates.decode_s_per_token, 9),
        "step_base_s": _rounded(engine.cost.base_s, 6),
        "step_s_per_job": _rounded(engine.cost.decode_s_per_job, 9),
    }


def _predictor(predictor: PredictorFacts) -> dict[str, Any]:
    quality = predictor.quality
    return {
        "model_version": predictor.model_version,
        "trained_unix_s": _rounded(predictor.trained_unix_s) if predictor.model_version else None,
        "samples": predictor.samples,
        "scored_jobs": quality.jobs,
        "tau_b": _rounded(quality.tau_b, 3),
        "mae_tokens": _rounded(quality.mae_tokens),
        "p50_coverage": _rounded(quality.p50_coverage, 3),
        "p90_coverage": _rounded(quality.p90_coverage, 3),
        "is_drifting": bool(quality.is_drifting),
    }


def _shadow(ratios: Ratios | None) -> dict[str, Any] | None:
    if ratios is None:
        return None
    return {
        "jobs": ratios.jobs,
        "mean_normalized_latency_ratio": _rounded(ratios.mean_normalized_latency, 3),
        "mean_jct_ratio": _rounded(ratios.mean_jct, 3),
        "p99_jct_ratio": _rounded(ratios.p99_jct, 3),
    }


def _job(engine: EngineFacts, row: JobRow, engine_rows: Sequence[JobRow]) -> dict[str, Any]:
    facts = row.facts
    low, middle, high = facts.length_tokens or (math.nan, math.nan, math.nan)
    return {
        "id": short_id(facts.job_id),
        "engine": short_id(engine.engine_id),
        "state": facts.state,
        "place": row.place,
        "age_s": _rounded(row.age_s),
        "prompt_tokens": facts.prompt_tokens,
        "output_tokens": facts.output_tokens,
        "p10_tokens": _rounded(low, 0),
        "p50_tokens": _rounded(middle, 0),
        "p90_tokens": _rounded(high, 0),
        "remaining_s": _rounded(row.remaining_s),
        "ewt_s": _rounded(row.ewt_s),
        # On the engine's own clock, which means nothing elsewhere: told from now.
        "priority_s": _rounded(facts.priority - engine.pace.now_s),
        "boost_s": _rounded(facts.arrival_s - facts.priority),
        "overtaken": row.overtaken,
        "overtaken_by": [short_id(job_id) for job_id in overtakers(row, engine_rows)],
        "overtakes": row.overtakes,
        "preemptions": facts.preemptions,
    }


def _count(some: Iterable[JobRow]) -> dict[str, int]:
    counts = dict.fromkeys(STATES, 0)
    for row in some:
        counts[row.facts.state] += 1
    return counts


def _rounded(value: float | None, digits: int = 1) -> float | int | None:
    """Round for JSON, which knows no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return round(value, digits) if digits else round(value)


def _number(parameters: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = parameters.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise QueryError(f"{name}={text[:20]!r}: allowed are whole numbers of {low} to {high}")
    return int(text)
