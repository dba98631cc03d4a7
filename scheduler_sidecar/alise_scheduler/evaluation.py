"""How well the predictor does on recorded conversations: split, train, score.

Works on token ids; reading and tokenizing files is `conversations`. Goes through the predictor's
own interface, so what is measured is what serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.lengths import QUANTILE_LEVELS, Quantiles
from alise_scheduler.predictor import (
    Outcome,
    Predictor,
    PredictorSettings,
    PromptInput,
    TrackedJob,
)
from alise_scheduler.quality import tau_b

PROGRESS_TOKENS: Final = (32, 128)

_P50: Final = QUANTILE_LEVELS.index(0.5)
_P90: Final = QUANTILE_LEVELS.index(0.9)
_MIN_JOBS: Final = 10


class NoModelError(ValueError):
    """What there was to learn from gave no model."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt and the answer it got."""

    prompt: PromptInput
    answer_ids: tuple[int, ...]
    encoding: npt.NDArray[np.float32] | None = None
    """By the prompt encoder."""

    def tracked_by(self, predictor: Predictor) -> TrackedJob:
        """Return its job as it is once the prompt has been encoded, if it was."""
        job = predictor.track(self.prompt)
        if self.encoding is not None:
            job.set_encoding(self.encoding)
        return job


@dataclass(frozen=True, slots=True)
class Report:
    """Figures on prompts not seen in training, averaged over the splits; NaN: too few jobs."""

    train_jobs: int
    test_jobs: int
    tau_b_by_look_ups: float
    """At arrival, before the prompt is encoded."""
    tau_b: float
    """Once it is: the others are of then, too. Without an encoder the same."""
    mae_tokens: float
    p50_coverage: float
    p90_coverage: float
    tau_b_remaining: dict[int, float]
    """Of the remaining length of jobs still running at so many tokens."""
    tau_b_remaining_by_prompt: dict[int, float]
    """The same when only the prompt's prediction is known."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Time that predictions take on one thread, by one clock."""

    single_median_ms: float
    single_p99_ms: float
    batched_prompts_per_s: float
    refresh_256_ms: float


@dataclass(frozen=True, slots=True)
class Latencies:
    """By the wall, and in CPU time: the same on an idle machine, the latter fair on a busy one."""

    wall: Latency
    cpu: Latency


def trained_on(
    conversations: Sequence[Conversation],
    table: Path | None,
    state_dir: Path | None = None,
    change: Callable[[TrackedJob], Any] = lambda _: None,
) -> Predictor:
    """Return a predictor that has observed all of `conversations` and trained once.

    Each job, when it has ended, goes through `change`: an ablation takes features out.
    """
    size = max(len(conversations), PredictorSettings().max_samples)
    predictor = Predictor(PredictorSettings(state_dir, max_samples=size))
    if table is not None:
        predictor.load_token_table(table)
    for conversation in conversations:
        job = conversation.tracked_by(predictor)
        job.extend(conversation.answer_ids, len(conversation.answer_ids))
        change(job)
        predictor.observe(job, Outcome.COMPLETE)
    predictor.train_now()
    return predictor


def split(
    conversations: Sequence[Conversation], train_share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return what to train on and what to test on, in a random order of this seed."""
    order = np.random.default_rng(seed).permutation(len(conversations))
    cut = int(train_share * len(order))
    return [conversations[i] for i in order[:cut]], [conversations[i] for i in order[cut:]]


def evaluate(
    conversations: Sequence[Conversation],
    table: Path | None,
    train_share: float,
    seeds: int,
    on_split: Callable[[], Any] = lambda: None,
    change: Callable[[TrackedJob], Any] = lambda _: None,
) -> Report:
    """Return the figures over `seeds` random splits; `change` is as for `trained_on`.

    Raises:
        NoModelError: too few conversations to train on, or no order to be learned from one split.
    """
    splits = []
    for seed in range(seeds):
        train, test = split(conversations, train_share, seed)
        predictor = trained_on(train, table, change=change)
        if predictor.model_version == 0:
            raise NoModelError(f"{len(train)} conversations to train on gave no model")
        splits.append(_score(predictor, test))
        on_split()
    return Report(
        train_jobs=int(train_share * len(conversations)),
        test_jobs=len(conversations) - int(train_share * len(conversations)),
        tau_b_by_look_ups=_mean([s["by_look_ups"] for s in splits]),
        tau_b=_mean([s["tau_b"] for s in splits]),
        mae_tokens=_mean([s["mae_tokens"] for s in splits]),
        p50_coverage=_mean([s["p50_coverage"] for s in splits]),
        p90_coverage=_mean([s["p90_coverage"] for s in splits]),
        tau_b_remaining={n: _mean([s[f"answer_{n}"] for s in splits]) for n in PROGRESS_TOKENS},
        tau_b_remaining_by_prompt={
            n: _mean([s[f"prompt_{n}"] for s in splits]) for n in PROGRESS_TOKENS
        },
    )


def _score(predictor: Predictor, test: Sequence[Conversation]) -> dict[str, float]:
    by_look_ups = _array(predictor.predict([predictor.track(c.prompt) for c in test]))
    jobs = [conversation.tracked_by(predictor) for conversation in test]
    lengths = np.array([len(conversation.answer_ids) for conversation in test])
    arrival = _array(predictor.predict(jobs))
    figures = {
        "by_look_ups": tau_b(by_look_ups[:, _P50], lengths),
        "tau_b": tau_b(arrival[:, _P50], lengths),
        "mae_tokens": float(np.abs(arrival[:, _P50] - lengths).mean()),
        "p50_coverage": float((lengths <= arrival[:, _P50]).mean()),
        "p90_coverage": float((lengths <= arrival[:, _P90]).mean()),
    }
    for tokens in PROGRESS_TOKENS:
        running = np.flatnonzero(lengths > tokens)
        if len(running) < _MIN_JOBS:
            figures[f"answer_{tokens}"] = figures[f"prompt_{tokens}"] = float("nan")
            continue
        for i in running:
            jobs[i].extend(test[i].answer_ids[jobs[i].output_tokens : tokens], tokens)
        left = lengths[running] - tokens
        predicted = _array(predictor.predict([jobs[i] for i in running]))
        figures[f"answer_{tokens}"] = tau_b(predicted[:, _P50], left)
        figures[f"prompt_{tokens}"] = tau_b(arrival[running, _P50], left)
    return figures


def measure_latency(predictor: Predictor, conversations: Sequence[Conversation]) -> Latencies:
    """Time single arrivals, batches of arrivals and refreshes of 256 answers in progress."""
    some = [conversations[i % len(conversations)] for i in range(1024)]

    def arrive(arrivals: Sequence[Conversation]) -> None:
        predictor.predict([predictor.track(conversation.prompt) for conversation in arrivals])

    arrive(some[:1])
    singles = np.array([_timed(partial(arrive, [c])) for c in some])
    batches = np.array([_timed(partial(arrive, some)) for _ in range(5)])
    refreshes = np.array([_refresh(predictor, some[:256]) for _ in range(9)])
    wall, cpu = (
        Latency(
            single_median_ms=float(np.median(singles[:, clock])) * 1e3,
            single_p99_ms=float(np.quantile(singles[:, clock], 0.99)) * 1e3,
            batched_prompts_per_s=len(some) / float(np.median(batches[:, clock])),
            refresh_256_ms=float(np.median(refreshes[:, clock])) * 1e3,
        )
        for clock in range(2)
    )
    return Latencies(wall, cpu)


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds by the wall and of this thread's CPU time."""
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - wall_s, time.thread_time() - cpu_s


def _refresh(predictor: Predictor, conversations: Sequence[Conversation]) -> tuple[float, float]:
    jobs = [conversation.tracked_by(predictor) for conversation in conversations]
    for job, conversation in zip(jobs, conversations, strict=True):
        job.extend(conversation.answer_ids[:40], 40)
    predictor.predict(jobs)
    for job, conversation in zip(jobs, conversations, strict=True):
        job.extend(conversation.answer_ids[40:48], 48)
    return _timed(partial(predictor.predict, jobs))


def report_to_json(report: Report, latency: Latencies | None) -> dict[str, Any]:
    """Return both as plain values."""
    result = asdict(report)
    if latency is not None:
        result["latency"] = asdict(latency)
    return result


def _array(quantiles: Sequence[Quantiles | None]) -> np.typing.NDArray[np.float64]:
    return np.array([q for q in quantiles if q is not None])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
