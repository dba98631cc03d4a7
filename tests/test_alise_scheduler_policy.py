"""Properties of the policies: order, bounds and limits."""

from __future__ import annotations

import math

import pytest
from alise_scheduler.policy import (
    OVERDUE_WAITS,
    PREDICTION_FREE,
    QUEUE_SHARE,
    JobView,
    Policy,
    PolicyParameters,
    boost_s,
    effective_work_s,
    gamma_for,
    mlfq_level,
    overdue_s,
    priority,
    soonest_priority,
    starvation_bound_s,
)
from hypothesis import assume, given
from hypothesis import strategies as st

seconds = st.floats(0.0, 1e5)
work = st.floats(1e-3, 1e4)
works = st.lists(work, min_size=1, max_size=20).map(sorted).map(tuple)
gammas = st.floats(1e-3, 1e2)
parameters = st.builds(PolicyParameters, gamma_per_s=gammas, aging_s=st.floats(0.1, 1e4))
jobs = st.builds(
    JobView,
    arrival_s=seconds,
    answer_left_s=st.one_of(st.just(()), works),
    attained_s=seconds,
    prefill_s=seconds,
    prompt_left_s=seconds,
    is_overdue=st.booleans(),
)


@given(st.sampled_from(Policy), jobs, parameters)
def test_every_priority_is_finite_so_that_the_order_is_total(policy, job, tunables) -> None:
    assert math.isfinite(priority(policy, job, tunables))


@given(
    policy=st.sampled_from([p for p in Policy if p not in PREDICTION_FREE]),
    arrivals=st.lists(seconds, min_size=2, unique=True),
    tunables=parameters,
)
def test_without_estimates_the_order_is_arrival(policy, arrivals, tunables) -> None:
    by_priority = sorted(arrivals, key=lambda a: priority(policy, JobView(a, ()), tunables))
    assert by_priority == sorted(arrivals)


@given(jobs, parameters)
def test_fcfs_ignores_estimates(job, tunables) -> None:
    assert priority(Policy.FCFS, job, tunables) == job.arrival_s


@given(own=works, other=works, arrival=seconds, extra_s=st.floats(1e-3, 1e5), tunables=parameters)
def test_no_job_that_arrives_after_the_bound_overtakes(own, other, arrival, extra_s, tunables):
    # What a distribution ranks as is never above its largest value, so that bounds it too.
    bound_s = starvation_bound_s(tunables, max(own))
    mine = priority(Policy.BOOST, JobView(arrival, own), tunables)
    late = JobView(arrival + bound_s + extra_s, other)
    assert priority(Policy.BOOST, late, tunables) > mine


@given(own=works, other=works, arrival=seconds, younger_s=st.floats(1e-3, 1e5), tunables=parameters)
def test_only_the_shortest_overtake_a_job_that_is_overdue(own, other, arrival, younger_s, tunables):
    mine = priority(Policy.BOOST, JobView(arrival, own, is_overdue=True), tunables)
    assert mine <= priority(Policy.BOOST, JobView(arrival, own), tunables)
    assume(min(other) > 0.1 / tunables.gamma_per_s)
    assert mine < priority(Policy.BOOST, JobView(arrival + younger_s, other), tunables)


def test_a_job_is_overdue_somewhat_after_the_longest_wait() -> None:
    assert overdue_s(0.5, 100.0, 8.0) == pytest.approx(OVERDUE_WAITS * 50.0)
    assert overdue_s(0.5, 0.0, 8.0) == 0.5 * 8.0


@given(work, work, gammas)
def test_boost_falls_with_work(one, other, gamma) -> None:
    assume(one < other)
    assert boost_s(one, gamma) >= boost_s(other, gamma) >= 0


@given(works)
def test_effective_work_lies_between_the_extremes(values) -> None:
    effective_s = effective_work_s(values, 1e-3)
    assert min(values) * (1 - 1e-9) <= effective_s <= max(values) * (1 + 1e-9)


@given(work)
def test_effective_work_of_a_certain_value_is_that_value(value) -> None:
    assert effective_work_s((value,) * 3, 1e-3) == pytest.approx(value)


def test_work_that_may_well_be_short_ranks_below_its_mean_until_it_has_outlived_that() -> None:
    # Serving for 1 s ends every tenth such job: (1/10 x 1/1) / 1 beats (1/10 + 9/1000) / 90.1.
    assert effective_work_s((1.0,) + (100.0,) * 9, 0.05) == pytest.approx(math.sqrt(10.0))
    assert effective_work_s((99.0,) * 9, 0.05) == pytest.approx(99.0)


def test_a_prompt_is_work_before_the_answer_and_an_old_answer_weighs_less() -> None:
    # 1/s of an answer of s in all, for what it takes from now on.
    assert effective_work_s((4.0,), 0.05, before_s=5.0) == pytest.approx(math.sqrt(4.0 * 9.0))
    assert effective_work_s((4.0,), 0.05, had_s=12.0) == pytest.approx(math.sqrt(16.0 * 4.0))


def test_of_equal_answers_the_one_with_the_shorter_prompt_goes_first() -> None:
    for policy in (Policy.BOOST, Policy.SRTF, Policy.SRTF_AGING):
        short, long = (
            priority(policy, JobView(0.0, (2.0,), prompt_left_s=s), PolicyParameters())
            for s in (0.1, 9.0)
        )
        assert short < long


def test_large_gamma_is_fcfs_and_small_gamma_is_sjf() -> None:
    early_long, late_short = JobView(0.0, (50.0,)), JobView(1.0, (5.0,))

    def is_short_first(gamma_per_s: float) -> bool:
        tunables = PolicyParameters(gamma_per_s=gamma_per_s)
        long, short = (priority(Policy.BOOST, j, tunables) for j in (early_long, late_short))
        return short < long

    assert is_short_first(1e-3)
    assert not is_short_first(10.0)


def test_gamma_is_a_share_of_the_inverse_of_the_usual_wait() -> None:
    # A queue as long as the batch is usual, one of 16 where the batch is larger.
    for batch_jobs, usual_jobs in [(0.0, 1.0), (8.0, 8.0), (256.0, 16.0)]:
        expected = pytest.approx(1 / (0.5 * usual_jobs))
        assert gamma_for(0.5, 0.0, batch_jobs) == expected
    assert math.isfinite(gamma_for(0.0, 0.0, 1.0))


def test_a_queue_longer_than_usual_makes_gamma_favour_the_mean() -> None:
    assert gamma_for(0.5, 8.0, 8.0) == gamma_for(0.5, 0.0, 8.0)
    longer = gamma_for(0.5, 108.0, 8.0)
    assert longer == pytest.approx(1 / (0.5 * (8.0 + QUEUE_SHARE * 100)))


@given(arrival=seconds, less=work, more=work, tunables=parameters)
def test_srtf_prefers_less_work(arrival, less, more, tunables) -> None:
    assume(less < more)
    for policy in (Policy.SRTF, Policy.SRTF_AGING, Policy.BOOST):
        short, long = (priority(policy, JobView(arrival, (w,)), tunables) for w in (less, more))
        assert short <= long


def test_aging_makes_up_for_e_times_the_work_in_its_time() -> None:
    tunables = PolicyParameters(aging_s=30.0)
    waited = priority(Policy.SRTF_AGING, JobView(0.0, (10.0 * math.e,)), tunables)
    fresh = priority(Policy.SRTF_AGING, JobView(30.0, (10.0,)), tunables)
    assert waited == pytest.approx(fresh)


@pytest.mark.parametrize(
    ("attained_s", "prefill_s", "level"),
    [(0.0, 0.0, 0), (0.9, 0.0, 0), (1.0, 0.0, 1), (2.9, 0.0, 1), (3.0, 0.0, 2), (1e9, 0.0, 7),
     (0.0, 1.5, 1), (0.0, 3.0, 2), (0.0, 1e9, 7)],
)  # fmt: skip
def test_mlfq_levels(attained_s: float, prefill_s: float, level: int) -> None:
    job = JobView(5.0, (), attained_s, prefill_s)
    assert mlfq_level(job, PolicyParameters()) == level


@given(jobs, jobs)
def test_mlfq_sorts_by_level_and_then_by_arrival(one, other) -> None:
    def key(job: JobView) -> tuple[int, float]:
        return mlfq_level(job, PolicyParameters()), job.arrival_s

    assume(key(one) < key(other))
    mine, its = (priority(Policy.MLFQ, job, PolicyParameters()) for job in (one, other))
    assert mine <= its


@given(works, seconds, parameters)
def test_first_tokens_go_before_all_who_have_theirs_within_the_bound(own, arrival, tunables):
    early = soonest_priority(arrival, tunables)
    assert early <= priority(Policy.BOOST, JobView(arrival, own), tunables)
    # The bound on starvation is that of the least work: no early job is boosted beyond it.
    assert arrival - early == pytest.approx(boost_s(tunables.least_work_s, tunables.gamma_per_s))


def test_boost_on_attained_service_prefers_who_has_had_less_and_needs_no_estimate() -> None:
    tunables = PolicyParameters()
    fresh = priority(Policy.BOOST_ATTAINED, JobView(10.0, ()), tunables)
    served = priority(Policy.BOOST_ATTAINED, JobView(10.0, (), attained_s=8.0), tunables)
    long_prompt = priority(Policy.BOOST_ATTAINED, JobView(10.0, (), prefill_s=2.0), tunables)
    assert fresh < long_prompt < served < 10.0
