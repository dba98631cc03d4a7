"""How the predictor learns: tau-b on prompts not seen, against finished jobs, and after a switch.

Jobs finish one by one through the predictor's own online path: its schedule decides when to
train, and drift is noticed as it would be in service. Does not know where jobs come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from alise_scheduler.evaluation import Conversation, split
from alise_scheduler.lengths import QUANTILE_LEVELS
from alise_scheduler.predictor import Outcome, Predictor, PredictorSettings
from alise_scheduler.quality import tau_b

_MEDIAN: Final = QUANTILE_LEVELS.index(0.5)
_TRAIN_SHARE: Final = 0.7  # as `alise predictor evaluate` has it
RECOVERED_WITHIN: Final = 0.05
RECOVERED_AFTER_JOBS: Final = 500


@dataclass(frozen=True, slots=True)
class Point:
    """How good predictions for the test jobs were from so many finished jobs on."""

    finished_jobs: int
    tau_b: float
    """Of the median, once prompts are encoded; 0 before the first model: no order."""
    model_version: int


@dataclass(frozen=True, slots=True)
class Curve:
    """One predictor's points: at the start, and whenever new models came; constant between."""

    seed: int
    name: str
    jobs: int
    points: tuple[Point, ...]

    def at(self, finished_jobs: int) -> float:
        """Return the tau-b when `finished_jobs` had finished."""
        return [p.tau_b for p in self.points if p.finished_jobs <= finished_jobs][-1]


def new_predictor(table: Path) -> Predictor:
    """Return a predictor that has seen nothing, with the product's settings."""
    predictor = Predictor(PredictorSettings())
    predictor.load_token_table(table)
    return predictor


def finish_all(
    name: str,
    seed: int,
    predictor: Predictor,
    jobs: Sequence[Conversation],
    test: Sequence[Conversation],
) -> Curve:
    """Let `jobs` finish one after another; score on `test` at the start and after trainings."""
    points = [_score(predictor, 0, test)]
    for number, one in enumerate(jobs, start=1):
        job = one.tracked_by(predictor)
        predictor.predict([job])
        job.extend(one.answer_ids, len(one.answer_ids))
        predictor.observe(job, Outcome.COMPLETE)
        if predictor.train_if_due():
            points.append(_score(predictor, number, test))
    return Curve(seed, name, len(jobs), tuple(points))


def learning_curves(
    first: Sequence[Conversation], then: Sequence[Conversation], table: Path, seed: int
) -> list[Curve]:
    """Return the curve on `first` from nothing and, with `then`, what its switch does.

    "fresh" starts on `then` from nothing; "switched" has learned `first` before.
    """
    predictor = new_predictor(table)
    curves = [finish_all("first", seed, predictor, *split(first, _TRAIN_SHARE, seed))]
    if then:
        curves += [
            finish_all("switched", seed, predictor, *split(then, _TRAIN_SHARE, seed)),
            finish_all("fresh", seed, new_predictor(table), *split(then, _TRAIN_SHARE, seed)),
        ]
    return curves


def recovery(curves: Sequence[Curve], after_jobs: int = RECOVERED_AFTER_JOBS) -> float:
    """Return the mean of fresh minus switched tau-b `after_jobs` after the switch."""
    by_name = {
        name: float(np.mean([c.at(after_jobs) for c in curves if c.name == name]))
        for name in ("fresh", "switched")
    }
    return by_name["fresh"] - by_name["switched"]


def _score(predictor: Predictor, finished: int, test: Sequence[Conversation]) -> Point:
    medians = [q[_MEDIAN] for q in predictor.predict([c.tracked_by(predictor) for c in test]) if q]
    lengths = [len(conversation.answer_ids) for conversation in test]
    tau = tau_b(medians, lengths) if medians else 0.0
    return Point(finished, tau, predictor.model_version)
