"""Dispatch: who makes room for whom. Tables for the rules, properties for the invariants."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from alise_engine.dispatch import (
    DispatchParameters,
    Room,
    RunningJob,
    WaitingJob,
    choose_victims,
    is_far_behind,
    is_worth_preempting,
)
from hypothesis import given
from hypothesis import strategies as st

PARAMETERS = DispatchParameters(
    margin_s=2.0, cost_weight=2.0, protected_s=1.0, max_preemptions_per_step=4
)
NO_ROOM = Room(slots=0, blocks=1000)  # and nobody is expected to end


def waiting(priority: float = 0.0, **changes: object) -> WaitingJob:
    job = WaitingJob("w", (0, priority, 1), is_ranked=True, remaining_s=2.0, blocks=4)
    return replace(job, **changes)


def running(priority: float = 10.0, **changes: object) -> RunningJob:
    job = RunningJob(
        "r",
        (0, priority, 0),
        is_ranked=True,
        remaining_s=20.0,
        preemption_s=0.5,
        blocks=8,
        is_preemptible=True,
    )
    return replace(job, **changes)


@pytest.mark.parametrize(
    ("candidate", "victim", "expected"),
    [
        pytest.param(waiting(), running(), True, id="short overtakes long"),
        pytest.param(waiting(is_ranked=False), running(), False, id="unranked candidate"),
        pytest.param(waiting(), running(is_ranked=False), False, id="unranked victim"),
        pytest.param(waiting(), running(is_preemptible=False), False, id="not running"),
        pytest.param(waiting(8.0), running(10.0), False, id="within the margin"),
        pytest.param(waiting(6.9), running(10.0), True, id="just beyond margin and cost"),
        pytest.param(waiting(), running(preemption_s=4.9), False, id="costs more than it brings"),
        pytest.param(waiting(), running(remaining_s=0.9), False, id="nearly done"),
        pytest.param(
            waiting(remaining_s=19.5), running(remaining_s=20.0), False, id="as long as the victim"
        ),
        pytest.param(
            waiting(remaining_s=None), running(remaining_s=None), True, id="policy without lengths"
        ),
        pytest.param(waiting(key=(1, -99.0, 1)), running(), False, id="lower class never"),
        pytest.param(waiting(key=(-1, 99.0, 1)), running(), True, id="higher class always"),
    ],
)
def test_worth_preempting(candidate: WaitingJob, victim: RunningJob, expected: bool) -> None:
    assert is_worth_preempting(candidate, victim, math.inf, PARAMETERS) is expected


@pytest.mark.parametrize(("wait_s", "expected"), [(2.9, False), (3.1, True)])
def test_a_slot_that_is_soon_free_is_waited_for(wait_s: float, expected: bool) -> None:
    # Margin 2 s, and recomputing the victim costs 2 x 0.5 s.
    assert is_worth_preempting(waiting(), running(), wait_s, PARAMETERS) is expected
    room = Room(slots=0, blocks=1000, frees_s=(wait_s, 20.0))
    assert choose_victims([waiting()], [running()], room, PARAMETERS) == ["r"] * expected


def test_the_second_waiting_job_waits_for_the_second_slot() -> None:
    jobs = [running(30.0 - i, job_id=f"r{i}") for i in range(3)]
    candidates = [waiting(float(i), job_id=f"w{i}") for i in range(3)]
    room = Room(slots=0, blocks=1000, frees_s=(10.0, 0.5, 10.0))
    assert choose_victims(candidates, jobs, room, PARAMETERS) == ["r0"]


def test_nobody_is_preempted_while_there_is_room() -> None:
    assert choose_victims([waiting()], [running()], Room(slots=1, blocks=4), PARAMETERS) == []


def test_worst_job_goes_first_and_each_candidate_takes_one_slot() -> None:
    jobs = [running(30.0 - i, job_id=f"r{i}") for i in range(4)]
    candidates = [waiting(float(i), job_id=f"w{i}") for i in range(2)]
    assert choose_victims(candidates, jobs, NO_ROOM, PARAMETERS) == ["r0", "r1"]


def test_a_victim_not_worth_it_is_passed_over() -> None:
    jobs = [running(30.0, job_id="done soon", remaining_s=0.1), running(20.0, job_id="long")]
    assert choose_victims([waiting()], jobs, NO_ROOM, PARAMETERS) == ["long"]


def test_blocks_count_as_room() -> None:
    jobs = [running(30.0, job_id="a", blocks=3), running(29.0, job_id="b", blocks=3)]
    room = Room(slots=5, blocks=0)
    assert choose_victims([waiting(blocks=5)], jobs, room, PARAMETERS) == ["a", "b"]
    assert choose_victims([waiting(blocks=7)], jobs, room, PARAMETERS) == []


def test_nobody_overtakes_the_first_waiting_job_by_fitting() -> None:
    first, second = waiting(9.5), waiting(9.6, job_id="fits")
    assert choose_victims([first, second], [running()], NO_ROOM, PARAMETERS) == []


seconds = st.floats(0.0, 500.0)
keys = st.tuples(st.integers(-1, 1), st.floats(-1e3, 1e3), st.integers(0, 1000))
waiting_jobs = st.builds(
    WaitingJob,
    job_id=st.uuids().map(str),
    key=keys,
    is_ranked=st.booleans(),
    remaining_s=st.none() | seconds,
    blocks=st.integers(1, 50),
)
running_jobs = st.builds(
    RunningJob,
    job_id=st.uuids().map(str),
    key=keys,
    is_ranked=st.booleans(),
    remaining_s=st.none() | seconds,
    preemption_s=st.floats(0.0, 10.0),
    blocks=st.integers(0, 50),
    is_preemptible=st.booleans(),
)


@given(
    st.lists(waiting_jobs, max_size=12),
    st.lists(running_jobs, max_size=12),
    st.builds(Room, slots=st.integers(0, 4), blocks=st.integers(0, 100)),
)
def test_victims_are_few_ranked_and_each_makes_room(
    candidates: list[WaitingJob], jobs: list[RunningJob], room: Room
) -> None:
    candidates.sort(key=lambda job: job.key)
    jobs.sort(key=lambda job: job.key, reverse=True)
    victims = choose_victims(candidates, jobs, room, PARAMETERS)
    by_id = {job.job_id: job for job in jobs}
    assert len(set(victims)) == len(victims) <= PARAMETERS.max_preemptions_per_step
    for job_id in victims:
        assert by_id[job_id].is_ranked
        assert by_id[job_id].is_preemptible
        assert any(is_worth_preempting(c, by_id[job_id], math.inf, PARAMETERS) for c in candidates)


@given(st.lists(waiting_jobs, max_size=12), st.lists(running_jobs, max_size=12))
def test_without_estimates_nobody_is_preempted(
    candidates: list[WaitingJob], jobs: list[RunningJob]
) -> None:
    candidates = [replace(job, is_ranked=False) for job in candidates]
    assert choose_victims(candidates, jobs, NO_ROOM, PARAMETERS) == []


@given(waiting_jobs, running_jobs, st.floats(0.0, 10.0))
def test_two_jobs_never_evict_each_other_in_turn(
    candidate: WaitingJob, victim: RunningJob, recompute_s: float
) -> None:
    if not is_worth_preempting(candidate, victim, math.inf, PARAMETERS):
        return
    winner = RunningJob(
        candidate.job_id,
        candidate.key,
        candidate.is_ranked,
        candidate.remaining_s,
        recompute_s,
        candidate.blocks,
        is_preemptible=True,
    )
    loser = WaitingJob(
        victim.job_id, victim.key, victim.is_ranked, victim.remaining_s, victim.blocks
    )
    assert not is_worth_preempting(loser, winner, math.inf, PARAMETERS)


@given(waiting_jobs, running_jobs)
def test_the_cheap_check_never_hides_a_preemption(
    candidate: WaitingJob, victim: RunningJob
) -> None:
    if is_worth_preempting(candidate, victim, math.inf, PARAMETERS):
        assert is_far_behind(victim.key, candidate.key, PARAMETERS)
