"""A benchmark's real runs simulated: the same requests and arrivals, and how far off it is.

The step cost is fitted to each run's own steps, from when its tokens came: how fast the machine was
in just that run is not what is simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from alise_scheduler.cost_model import StepCost, fit
from alise_scheduler.events import StepTiming
from alise_scheduler.replica import SimulatedRequest

from alise_bench.dataset import Item
from alise_bench.errors import BenchError
from alise_bench.metrics import RequestRow, itl_p50_s, run_metrics
from alise_bench.simulation.compare import SimulatedMetrics, metrics_of, simulate
from alise_bench.simulation.predictors import SavedPredictor, saved_predictors
from alise_bench.simulation.profiles import Profile
from alise_bench.simulation.systems import ALISE, FCFS, SYSTEMS, SimulatedSystem
from alise_bench.simulation.workload import recorded_request
from alise_bench.store import Run, load_plan, load_runs, trained_state
from alise_bench.systems import System

_SAME_STEP_SHARE: Final = 0.75  # of a usual step: its tokens reach the clients within this
_TOGETHER_SHARE: Final = 0.25  # of a usual step: two tokens of one job so close came together
_LONGEST_STEP_S: Final = 8.0  # beyond it the engine was idle

SIMULATED_AS: Final[dict[System, SimulatedSystem]] = {
    System.FCFS: FCFS,
    System.ALISE: ALISE,
    System.ALISE_RECOMPUTE: SYSTEMS["alise-recompute"],
    System.ALISE_ORACLE: SYSTEMS["alise-oracle"],
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One real run and its simulation."""

    run: str
    real: SimulatedMetrics
    simulated: SimulatedMetrics


def steps_of(rows: Sequence[RequestRow]) -> list[StepTiming]:
    """Return the engine's steps as the clients saw them: tokens that came together are one."""
    return [step for _, step in timed_steps_of(rows)]


def timed_steps_of(rows: Sequence[RequestRow]) -> list[tuple[float, StepTiming]]:
    """Return the same, each with when it ended."""
    tokens = sorted((time_s, index) for index, row in enumerate(rows) for time_s in row.token_s)
    # The first token of an answer comes up to half a step after others of its step, as the server
    # begins the answer with it, or even together with the next one. Taken for a step of their own
    # they spoil the fit.
    itl_s = itl_p50_s(rows)
    groups: list[tuple[float, set[int]]] = []  # when a step's first token came, and whose came
    last_s = -math.inf
    last_of: dict[int, float] = {}
    for time_s, index in tokens:
        is_second = bool(groups) and index in groups[-1][1]  # and a job has one a step
        came_together = is_second and time_s - last_of[index] < _TOGETHER_SHARE * itl_s
        if came_together and len(groups) > 1 and index not in groups[-2][1]:
            groups[-2][1].add(index)  # the one before came late
        elif is_second or time_s - last_s >= _SAME_STEP_SHARE * itl_s:
            groups.append((time_s, set()))
        groups[-1][1].add(index)
        last_s = last_of[index] = time_s
    out = [0] * len(rows)
    steps = []
    for (before_s, _), (end_s, members) in pairwise([(-math.inf, set()), *groups]):
        prefill = decodes = context = 0
        for index in members:
            if out[index]:
                decodes += 1
                context += rows[index].prompt_tokens + out[index]
            else:
                prefill += rows[index].prompt_tokens
            out[index] += 1
        if (seconds := end_s - before_s) < _LONGEST_STEP_S:
            steps.append((end_s, StepTiming(prefill, decodes, context, seconds)))
    return steps


@dataclass(frozen=True, slots=True)
class Recorded:
    """The tokens that a benchmark's runs were about, for the predictors that they had."""

    items: Mapping[str, Item]
    """By id."""
    model: Path


def compare_with_runs(
    folder: Path, profile: Profile, sigma: float, recorded: Recorded | None = None
) -> list[Comparison]:
    """Simulate every finished run of a benchmark's folder on `profile` with fitted step costs.

    Slots are the benchmark's own. With `recorded` each run has the models that it began with, and
    otherwise lengths with an error of `sigma`. Raises `BenchError`.
    """
    slots = int(load_plan(folder)["settings"]["slots"])
    runs = [run for run in load_runs(folder) if run.id.system in SIMULATED_AS]
    predictors = {} if recorded is None else _predictors(folder, runs, recorded.model)
    comparisons = []
    for run in runs:
        cost = fit(steps_of(run.rows), StepCost())
        rows = sorted((r for r in run.rows if r.error is None), key=lambda row: row.arrival_s)
        outcomes = simulate(
            SIMULATED_AS[run.id.system],
            _requests(rows, recorded),
            replace(profile, hardware=replace(profile.hardware, step=cost, slots=slots)),
            sigma=sigma,
            seed=run.id.repeat,
            predictor=predictors.get(run.id.repeat) if run.id.system.is_predicting else None,
        )
        comparisons.append(Comparison(run.id.name, _real(run, rows), metrics_of(outcomes)))
    return comparisons


def _predictors(folder: Path, runs: Sequence[Run], model: Path) -> dict[int, SavedPredictor]:
    """Return the models that the runs of each repeat began with."""
    repeats = sorted({run.id.repeat for run in runs if run.id.system.is_predicting})
    states = [trained_state(folder, repeat) for repeat in repeats]
    return dict(zip(repeats, saved_predictors(states, model), strict=True))


def _requests(rows: Sequence[RequestRow], recorded: Recorded | None) -> Sequence[SimulatedRequest]:
    if recorded is None:
        return [SimulatedRequest(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in rows]
    if unknown := [row.id for row in rows if row.id not in recorded.items]:
        raise BenchError(f"--dataset has no usable row {unknown[0]!r}, which the runs asked for")
    return [recorded_request(recorded.items[row.id], row.arrival_s) for row in rows]


def _real(run: Run, rows: Sequence[RequestRow]) -> SimulatedMetrics:
    real = run_metrics(rows, run.counts, 1.0)
    return SimulatedMetrics(
        normalized_latency_s=real.normalized_latency_s.mean,
        jct_s=real.jct_s.mean,
        jct_p99_s=real.jct_s.p99,
        jct_max_s=max(row.finish_s - row.arrival_s for row in rows),
        ttft_s=real.ttft_s.mean,
        ttft_p99_s=real.ttft_s.p99,
        longest_gap_p99_s=real.longest_gap_s.p99,
        tokens_per_s=real.tokens_per_s,
        preemptions=float(real.preemptions),
        recomputed_share=real.recomputed_share,
    )
