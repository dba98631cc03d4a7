"""Runs systems on the same requests, and says what came of it in the terms of the benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from alise_scheduler.engine_state import LengthPredictor
from alise_scheduler.replica import Outcome, SimulatedRequest, replay

from alise_bench.errors import BenchError
from alise_bench.simulation.predictors import NoisyPredictor
from alise_bench.simulation.profiles import Profile
from alise_bench.simulation.steering import AliseSteering
from alise_bench.simulation.systems import SimulatedSystem


@dataclass(frozen=True, slots=True)
class SimulatedMetrics:
    """One system on one workload; seconds, over requests."""

    normalized_latency_s: float
    """Mean of JCT / output tokens, s/token."""
    jct_s: float
    jct_p99_s: float
    jct_max_s: float
    ttft_s: float
    ttft_p99_s: float
    longest_gap_p99_s: float
    tokens_per_s: float
    preemptions: float
    recomputed_share: float
    """Of the tokens that preemptions took from the device; NaN without any."""


METRICS = tuple(field.name for field in fields(SimulatedMetrics))


def metrics_of(outcomes: Sequence[Outcome]) -> SimulatedMetrics:
    """Return the metrics of a simulation; `outcomes` is not empty."""
    arrival, first, finish, tokens = np.array(
        [(o.arrival_s, o.first_token_s, o.finish_s, o.output_tokens) for o in outcomes]
    ).T
    jct, ttft = finish - arrival, first - arrival
    preempted = sum(o.preempted_tokens for o in outcomes)
    recomputed = sum(o.recomputed_tokens for o in outcomes)
    return SimulatedMetrics(
        normalized_latency_s=float(np.mean(jct / tokens)),
        jct_s=float(np.mean(jct)),
        jct_p99_s=float(np.percentile(jct, 99)),
        jct_max_s=float(np.max(jct)),
        ttft_s=float(np.mean(ttft)),
        ttft_p99_s=float(np.percentile(ttft, 99)),
        longest_gap_p99_s=float(np.percentile([o.longest_gap_s for o in outcomes], 99)),
        tokens_per_s=float(tokens.sum() / (finish.max() - arrival.min())),
        preemptions=float(sum(o.preemptions for o in outcomes)),
        recomputed_share=recomputed / preempted if preempted else math.nan,
    )


def simulate(
    system: SimulatedSystem,
    requests: Sequence[SimulatedRequest],
    profile: Profile,
    *,
    sigma: float,
    seed: int = 0,
    replicas: int = 1,
    predictor: LengthPredictor | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Return what becomes of `requests` under `system`, each replica taking every n-th one.

    Lengths are told by `predictor`, or with an error of `sigma` (`NoisyPredictor`). Raises
    `BenchError` for requests that fit no replica.
    """
    outcomes: list[Outcome] = []
    for replica in range(replicas):
        share = requests[replica::replicas]
        steering = None
        if system.policy is not None:
            asked = predictor or NoisyPredictor(sigma, seed * replicas + replica)
            steering = AliseSteering(system, profile.hardware, profile.tier, asked)
        try:
            outcomes += replay(share, profile.hardware, steering, on_progress)
        except ValueError as error:
            raise BenchError(f"--profile {profile.name}: {error}") from error
    return outcomes


def median_metrics(runs: Sequence[SimulatedMetrics]) -> SimulatedMetrics:
    """Return the median of each metric over repeats."""
    rows = [list(asdict(run).values()) for run in runs]
    return SimulatedMetrics(*(float(m) for m in np.median(np.array(rows), axis=0)))
