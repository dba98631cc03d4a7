"""How many replicas meet an objective: the smallest number, system by system."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from alise_scheduler.engine_state import LengthPredictor
from alise_scheduler.replica import SimulatedRequest

from alise_bench.errors import BenchError
from alise_bench.simulation.compare import METRICS, SimulatedMetrics, metrics_of, simulate
from alise_bench.simulation.profiles import Profile
from alise_bench.simulation.systems import SimulatedSystem


@dataclass(frozen=True, slots=True)
class Objective:
    """A bound of one metric."""

    metric: str
    limit: float

    def is_met(self, metrics: SimulatedMetrics) -> bool:
        """Return whether the metric is within its bound."""
        return bool(getattr(metrics, self.metric) <= self.limit)


def parse_objective(text: str) -> Objective:
    """Read `METRIC<=NUMBER`. Raises `BenchError` that names what is allowed."""
    match = re.fullmatch(r"\s*(\w+)\s*<=\s*([0-9.eE+-]+)\s*", text)
    if match is None or match[1] not in METRICS:
        raise BenchError(
            f"--what-if {text!r}: METRIC<=NUMBER is needed, with one of {', '.join(METRICS)}"
        )
    try:
        return Objective(match[1], float(match[2]))
    except ValueError as error:
        raise BenchError(f"--what-if {text!r}: {match[2]!r} is not a number") from error


@dataclass(frozen=True, slots=True)
class Answer:
    """What one system needs; None if even the most replicas do not do."""

    system: str
    replicas: int | None
    metrics: SimulatedMetrics


def replicas_needed(
    system: SimulatedSystem,
    requests: Sequence[SimulatedRequest],
    profile: Profile,
    objective: Objective,
    *,
    sigma: float,
    most: int,
    predictor: LengthPredictor | None = None,
) -> Answer:
    """Return the smallest number of replicas, up to `most`, that meets `objective`.

    More replicas never make latencies worse, so the number is found by halving.
    """

    def metrics(replicas: int) -> SimulatedMetrics:
        return metrics_of(
            simulate(system, requests, profile, sigma=sigma, replicas=replicas, predictor=predictor)
        )

    low, high, found = 1, most, metrics(most)
    if not objective.is_met(found):
        return Answer(system.name, None, found)
    while low < high:
        middle = (low + high) // 2
        here = metrics(middle)
        if objective.is_met(here):
            high, found = middle, here
        else:
            low = middle + 1
    return Answer(system.name, high, found)
