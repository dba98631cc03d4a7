"""The shadow's check: runs that the model itself has made are found to be what they are."""

from __future__ import annotations

import random

import pytest
from alise_bench.metrics import RequestRow
from alise_bench.shadow_check import ShadowCheck, errors, shadow_pairs
from alise_scheduler.cost_model import StepCost
from alise_scheduler.engine_state import Introduction
from alise_scheduler.replica import Hardware, SimulatedRequest, replay
from alise_scheduler.shadow import Ratios, ratios

STEP = StepCost(0.05, 0.003, 0.004)
ENGINE = Introduction("", slots=8, kv_tokens=9000, block_tokens=16)


def fcfs_rows(count: int, rate_per_s: float) -> list[RequestRow]:
    """A FCFS run by the model; a token each step, as far as first and last tell."""
    rng = random.Random(2)
    now_s, requests = 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(rate_per_s)
        requests.append(SimulatedRequest(now_s, rng.randint(10, 60), rng.randint(2, 120)))
    hardware = Hardware(STEP, slots=8, kv_tokens=9000)
    rows = []
    for number, (request, outcome) in enumerate(
        zip(requests, replay(requests, hardware), strict=True)
    ):
        each_s = (outcome.finish_s - outcome.first_token_s) / max(request.output_tokens - 1, 1)
        token_s = tuple(outcome.first_token_s + each_s * i for i in range(request.output_tokens))
        rows.append(
            RequestRow(
                str(number),
                request.arrival_s,
                request.arrival_s,
                token_s,
                outcome.finish_s,
                prompt_tokens=request.prompt_tokens,
            )
        )
    return rows


def test_every_job_is_compared_and_fcfs_is_like_fcfs() -> None:
    rows = fcfs_rows(120, rate_per_s=0.2)
    found = ratios(shadow_pairs(rows, ENGINE))
    assert found is not None
    assert found.jobs == 120
    # Jobs that mostly run alone: there the client's view of steps is the engine's.
    assert found.mean_jct == pytest.approx(1.0, abs=0.1)


def test_errors_are_ratios_of_ratios() -> None:
    check = ShadowCheck("x", Ratios(80, 0.6, 0.9, 1.1), Ratios(80, 0.5, 1.0, 1.0))
    assert errors(check) == pytest.approx((1.2, 0.9, 1.1))
