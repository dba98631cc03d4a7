"""The sidecar's shadow against the truth: what it would have said in a benchmark's real runs.

Each run's jobs and steps, as its client saw them, go through the very code of the sidecar, once a
second of the run's own time; its ratios are then put beside those to the real FCFS run of the same
requests. Steps are told from tokens that come together, so those that ran preempted prompts again
look slower than they were: the engine itself knows better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alise_scheduler.engine_state import Introduction
from alise_scheduler.history import PastJob
from alise_scheduler.shadow import Pair, Ratios, ratios
from alise_scheduler.shadow_runner import EngineShadow, Feed

from alise_bench.errors import BenchError
from alise_bench.metrics import RequestRow
from alise_bench.simulation.against import timed_steps_of
from alise_bench.store import Run, load_plan, load_runs
from alise_bench.systems import System

_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class ShadowCheck:
    """One run: what the shadow says, and what the real FCFS run says."""

    run: str
    shadow: Ratios
    real: Ratios


def check_shadow(folder: Path, kv_tokens: int) -> list[ShadowCheck]:
    """Return the checks of a benchmark's finished runs; `kv_tokens` as the engine had it.

    Raises `BenchError` without a FCFS run of the same rate and repeat.
    """
    slots = int(load_plan(folder)["settings"]["slots"])
    runs = load_runs(folder)
    fcfs_runs = {
        (run.id.rate_per_s, run.id.repeat): run for run in runs if run.id.system is System.FCFS
    }
    checks = []
    for run in runs:
        fcfs = fcfs_runs.get((run.id.rate_per_s, run.id.repeat))
        if fcfs is None:
            raise BenchError(f"{folder}: there is no run of fcfs beside {run.id.name}")
        pairs = shadow_pairs(_rows(run), Introduction("", slots, kv_tokens, block_tokens=16))
        shadow, real = ratios(pairs), _real(_rows(run), _rows(fcfs))
        if shadow is not None and real is not None:
            checks.append(ShadowCheck(run.id.name, shadow, real))
    return checks


def shadow_pairs(rows: Sequence[RequestRow], engine: Introduction) -> list[Pair]:
    """Run one run's rows through the sidecar's shadow; return its pairs."""
    one = EngineShadow()
    ends = sorted(rows, key=lambda row: row.finish_s)
    steps = timed_steps_of(rows)
    now_s, last_s = 0.0, ends[-1].finish_s
    while now_s <= last_s + _PERIOD_S:
        now_s += _PERIOD_S
        before_s = now_s - _PERIOD_S
        live_s = [row.arrival_s for row in rows if row.arrival_s <= now_s < row.finish_s]
        one.advance(
            Feed(
                engine_id="",
                ended=[_past(row) for row in ends if before_s < row.finish_s <= now_s],
                steps=[step for end_s, step in steps if before_s < end_s <= now_s],
                horizon_s=min(live_s, default=now_s),
                engine=engine,
            )
        )
    one.advance(Feed("", [], [], float("inf"), engine))
    return list(one.shadow.pairs)


def _past(row: RequestRow) -> PastJob:
    return PastJob(row.arrival_s, row.prompt_tokens, row.output_tokens, row.finish_s, True)


def _rows(run: Run) -> list[RequestRow]:
    return sorted((row for row in run.rows if row.error is None), key=lambda row: row.arrival_s)


def _real(served: Sequence[RequestRow], fcfs: Sequence[RequestRow]) -> Ratios | None:
    of = {row.id: row for row in fcfs}
    return ratios(
        Pair(
            row.finish_s - row.arrival_s,
            of[row.id].finish_s - of[row.id].arrival_s,
            row.output_tokens,
        )
        for row in served
        if row.id in of and row.output_tokens == of[row.id].output_tokens
    )


def errors(check: ShadowCheck) -> tuple[float, float, float]:
    """Return what the shadow says over what is true, for the three ratios."""
    said, true = check.shadow, check.real
    return (
        said.mean_normalized_latency / true.mean_normalized_latency,
        said.mean_jct / true.mean_jct,
        said.p99_jct / true.p99_jct,
    )
