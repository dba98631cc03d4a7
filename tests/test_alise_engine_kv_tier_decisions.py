"""What the KV tier stores, evicts, loads, and what a preemption costs."""

from __future__ import annotations

import math

import pytest
from alise_engine.kv_tier.decisions import (
    Copy,
    CopyCosts,
    Holding,
    LikelyVictim,
    TierParameters,
    choose_evictions,
    choose_stores,
    hopeful,
    is_prefetch_due,
    preemption_s,
    recompute_s,
    store_budget_blocks,
    swap_s,
)
from alise_scheduler.waiting import waiting_times
from hypothesis import given
from hypothesis import strategies as st

PARAMETERS = TierParameters(store_share=0.05, min_remaining_s=4.0, likely_victims=2, lead_steps=2.0)
COSTS = CopyCosts(store_s_per_token=0.002, load_s_per_token=0.001, prefill_s_per_token=0.01)


@pytest.mark.parametrize(
    ("copy", "expected_s"),
    [
        pytest.param(Copy(100, 0), 100 * 0.002 + 100 * 0.001, id="nothing stored"),
        pytest.param(Copy(100, 96), 4 * 0.002 + 100 * 0.001, id="most stored"),
        pytest.param(Copy(100, 112), 100 * 0.001, id="stored beyond what is on the device"),
    ],
)
def test_swapping_costs_what_is_missing_and_the_way_back(copy: Copy, expected_s: float) -> None:
    assert swap_s(copy, COSTS) == pytest.approx(expected_s)


def test_preempting_costs_the_cheaper_way() -> None:
    copy = Copy(100, 0)
    slow_copies = CopyCosts(0.02, 0.02, prefill_s_per_token=0.001)
    assert preemption_s(copy, COSTS) == swap_s(copy, COSTS) < recompute_s(copy, COSTS)
    assert preemption_s(copy, slow_copies) == recompute_s(copy, slow_copies) == 0.1


@pytest.mark.parametrize("times_too_slow", [1.5, 3.0, 20.0])
def test_copies_that_seemed_too_slow_are_tried_again_the_rarer_the_slower(
    times_too_slow: float,
) -> None:
    copy, prefill_s = Copy(100, 0), 0.001
    costs = CopyCosts(times_too_slow * prefill_s / 2, times_too_slow * prefill_s / 2, prefill_s)

    def is_refused(refusals: int) -> bool:
        hoped = hopeful(costs, refusals)
        return swap_s(copy, hoped) >= recompute_s(copy, hoped)

    assert [is_refused(n) for n in (0, int(7.9 * (times_too_slow - 1)))] == [True, True]
    assert not is_refused(int(8 * (times_too_slow - 1)) + 1)


@pytest.mark.parametrize(
    ("frees_s", "free_slots", "work_s", "expected"),
    [
        pytest.param([5.0, 9.0], 0, [1.0, 1.0, 1.0], [5.0, 6.0, 7.0], id="one slot serves all"),
        pytest.param([5.0, 5.5], 0, [9.0, 1.0, 1.0], [5.0, 5.5, 6.5], id="slots take turns"),
        pytest.param([5.0], 1, [2.0, 2.0], [0.0, 2.0], id="a free slot"),
        pytest.param([], 0, [1.0], [math.inf], id="no slot in sight"),
        pytest.param([1.0], 0, [math.inf, 1.0], [1.0, math.inf], id="unknown work blocks a slot"),
    ],
)
def test_waiting_times(
    frees_s: list[float], free_slots: int, work_s: list[float], expected: list[float]
) -> None:
    assert waiting_times(frees_s, free_slots, work_s) == pytest.approx(expected)


@pytest.mark.parametrize(("ewt_s", "is_due"), [(0.4, True), (0.5, True), (0.51, False)])
def test_a_copy_starts_back_when_its_job_needs_it(ewt_s: float, is_due: bool) -> None:
    assert is_prefetch_due(ewt_s, load_s=0.3, step_s=0.1, parameters=PARAMETERS) is is_due


def test_storing_ahead_takes_a_share_of_a_step() -> None:
    assert store_budget_blocks(0.1, 0.001, PARAMETERS) == pytest.approx(5.0)


def test_the_worst_running_jobs_are_stored_ahead() -> None:
    running = [
        LikelyVictim("nearly done", 3.9, 10),
        LikelyVictim("worst", 50.0, 3),
        LikelyVictim("next", None, 10),
        LikelyVictim("third", 20.0, 10),
    ]
    assert choose_stores(running, 5, PARAMETERS) == [("worst", 3), ("next", 2)]
    assert choose_stores(running, 100, PARAMETERS) == [("worst", 3), ("next", 10)]
    assert choose_stores(running, 0, PARAMETERS) == []


def test_a_stored_job_does_not_open_the_door_to_all_others() -> None:
    running = [LikelyVictim("a", 9.0, 0), LikelyVictim("b", 9.0, 0), LikelyVictim("c", 9.0, 5)]
    assert choose_stores(running, 5, PARAMETERS) == []


def test_the_longest_wait_loses_its_copy_first_and_running_jobs_before() -> None:
    holdings = [
        Holding("soon", 10, 1.0),
        Holding("late", 10, 60.0),
        Holding("running", 4, math.inf),
        Holding("being read", 0, math.inf),
    ]
    assert choose_evictions(holdings, 6, ewt_s=10.0) == [("running", 4), ("late", 2)]
    assert choose_evictions(holdings, 99, ewt_s=10.0) == [("running", 4), ("late", 10)]
    assert choose_evictions(holdings, 99, ewt_s=math.inf) == []


holdings_strategy = st.lists(
    st.builds(
        Holding,
        st.uuids().map(str),
        st.integers(0, 50),
        st.one_of(st.floats(0, 1e6), st.just(math.inf)),
    ),
    max_size=20,
    unique_by=lambda h: h.job_id,
)


@given(holdings_strategy, st.integers(0, 200), st.floats(0, 1e6))
def test_evictions_are_possible_needed_and_fair(
    holdings: list[Holding], needed: int, ewt_s: float
) -> None:
    by_id = {h.job_id: h for h in holdings}
    chosen = choose_evictions(holdings, needed, ewt_s)
    assert all(0 < count <= by_id[job_id].evictable_blocks for job_id, count in chosen)
    assert sum(count for _, count in chosen) <= needed
    assert all(by_id[job_id].ewt_s > ewt_s for job_id, _ in chosen)
    taken = dict(chosen)
    if chosen:
        shortest = min(by_id[job_id].ewt_s for job_id in taken)
        longer = [h for h in holdings if h.ewt_s > shortest]
        assert all(taken.get(h.job_id, 0) == h.evictable_blocks for h in longer)


@given(st.lists(st.floats(0, 100), max_size=8), st.lists(st.floats(0, 100), max_size=30))
def test_nobody_waits_less_than_who_is_before_him(
    frees_s: list[float], work_s: list[float]
) -> None:
    times = waiting_times(frees_s, 0, work_s)
    assert times == sorted(times)
