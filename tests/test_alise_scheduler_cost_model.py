"""The cost model finds what a machine's steps cost, whatever odd steps come between."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from alise_scheduler.cost_model import CostModel, ServiceRates, StepCost, fit
from alise_scheduler.events import StepTiming
from hypothesis import given
from hypothesis import strategies as st

MACHINE = StepCost(0.04, 3e-4, 1.4e-3, 2e-6)


def timing(prefill: int, jobs: int, context: int, factor: float = 1.0) -> StepTiming:
    return StepTiming(prefill, jobs, context, MACHINE.step_s(prefill, jobs, context) * factor)


def steps(count: int, *, outliers: float = 0.0, noise: float = 0.05) -> list[StepTiming]:
    rng = random.Random(1)
    made = []
    for _ in range(count):
        jobs = rng.randint(0, 16)
        prefill = rng.choice([0, 0, rng.randint(10, 1000)]) if jobs else rng.randint(10, 1000)
        factor = rng.lognormvariate(0, noise) * (20 if rng.random() < outliers else 1)
        made.append(timing(prefill, jobs, jobs * rng.randint(50, 2000), factor))
    return made


def predicted_ratio(cost: StepCost, prefill: int, jobs: int, context: int) -> float:
    return cost.step_s(prefill, jobs, context) / MACHINE.step_s(prefill, jobs, context)


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_fit_finds_the_machine(outliers: float) -> None:
    cost = fit(steps(512, outliers=outliers), StepCost())
    for load in ((0, 1, 100), (0, 16, 16_000), (500, 0, 0), (1000, 8, 4000)):
        assert predicted_ratio(cost, *load) == pytest.approx(1.0, abs=0.1)


def test_what_was_never_seen_keeps_its_value() -> None:
    cost = fit([timing(0, jobs, 0) for jobs in range(1, 17)], StepCost(prefill_s_per_token=7.0))
    assert cost.prefill_s_per_token == 7.0
    assert predicted_ratio(cost, 0, 8, 0) == pytest.approx(1.0, abs=1e-6)


def test_rates_follow_the_present_load() -> None:
    model = CostModel()
    for step in steps(512):
        model.observe(step)
    for _ in range(64):
        model.observe(timing(0, 1, 100))
    alone = model.rates().decode_s_per_token
    for _ in range(64):
        model.observe(timing(0, 16, 16 * 100))
    assert model.is_fitted
    assert alone == pytest.approx(MACHINE.step_s(0, 1, 100), rel=0.1)
    assert model.rates().decode_s_per_token == pytest.approx(MACHINE.step_s(0, 16, 1600), rel=0.1)


def test_with_drafts_a_step_is_shared_by_the_tokens_that_it_gives() -> None:
    plain, drafting = CostModel(), CostModel()
    for step in steps(512):
        plain.observe(step)
        drafting.observe(replace(step, decoded_tokens=3 * step.decode_jobs))
    expected_s = plain.rates().decode_s_per_token / 3
    assert drafting.rates().decode_s_per_token == pytest.approx(expected_s)
    assert drafting.rates().prefill_s_per_token == plain.rates().prefill_s_per_token


def test_execution_time_is_prefill_and_decode() -> None:
    assert ServiceRates(0.01, 0.5).service_s(100, 3) == pytest.approx(1.0 + 1.5)


def test_the_engine_is_as_busy_as_what_its_jobs_take_of_it() -> None:
    model = CostModel()
    for step in steps(512):
        model.observe(step)
    for _ in range(64):
        model.observe(timing(0, 16, 1600))
    # 16 jobs of a prompt of 100 and 50 tokens each: so many prompts, and 50 steps together.
    rates = model.rates()
    busy_s = 16 * 100 * rates.prefill_s_per_token + 50 * rates.decode_s_per_token
    assert 16 * rates.engine_s(100, 50) == pytest.approx(busy_s)


@given(
    st.lists(
        st.builds(
            StepTiming,
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**64 - 1),
            st.floats(allow_nan=False, allow_infinity=False),
        ),
        max_size=80,
    )
)
def test_no_timings_make_a_rate_that_is_not_positive(timings: list[StepTiming]) -> None:
    model = CostModel()
    for item in timings:
        model.observe(item)
    rates = model.rates()
    assert 0 < rates.prefill_s_per_token < float("inf")
    assert 0 < rates.decode_s_per_token < float("inf")


def test_fit_keeps_the_total_time_of_the_steps() -> None:
    """Errors relative to each step alone would put it several per cent too low."""
    noisy = steps(512, noise=0.3)
    cost = fit(noisy, StepCost())
    fitted_s = sum(cost.step_s(s.prefill_tokens, s.decode_jobs, s.context_tokens) for s in noisy)
    assert fitted_s == pytest.approx(sum(step.duration_s for step in noisy), rel=0.005)


def test_others_prompts_count_to_the_time_of_an_answer_but_not_to_its_work() -> None:
    alone, crowded = CostModel(), CostModel()
    for step in steps(512):
        alone.observe(step)
        crowded.observe(step)
    for _ in range(64):
        alone.observe(timing(0, 16, 1600))
        crowded.observe(timing(1000, 16, 1600))
    assert alone.rates().elapsed_s(0, 10) == pytest.approx(10 * MACHINE.step_s(0, 16, 1600), 0.1)
    assert crowded.rates().elapsed_s(0, 10) == pytest.approx(
        10 * MACHINE.step_s(1000, 16, 1600), rel=0.1
    )
    assert crowded.rates().engine_s(0, 10) == pytest.approx(alone.rates().engine_s(0, 10), rel=0.1)
