"""The modelled engine: its own arithmetic against a step-by-step one, and what never happens."""

from __future__ import annotations

import math

import pytest
from alise_scheduler.cost_model import StepCost
from alise_scheduler.replica import (
    FirstComeFirstServed,
    Hardware,
    Replica,
    SimulatedRequest,
    replay,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

COST = StepCost(0.05, 1e-3, 2e-3, 1e-6)
SMALL = Hardware(COST, slots=2, kv_tokens=4000, block_tokens=16, batched_tokens=64)

requests_of = st.lists(
    st.tuples(st.floats(0.0, 20.0), st.integers(1, 150), st.integers(1, 60)),
    min_size=1,
    max_size=12,
).map(lambda rows: [SimulatedRequest(*row) for row in sorted(rows)])
hardware_of = st.builds(
    Hardware,
    st.just(COST),
    slots=st.integers(1, 4),
    kv_tokens=st.integers(300, 900),
    block_tokens=st.just(16),
    batched_tokens=st.integers(8, 256),
)


def test_one_request_takes_its_prefill_and_one_step_a_token() -> None:
    (outcome,) = replay([SimulatedRequest(3.0, 100, 5)], SMALL)
    first_s = COST.step_s(64, 0, 0) + COST.step_s(36, 0, 0)  # two chunks: 64 tokens a step
    assert outcome.first_token_s == pytest.approx(3.0 + first_s)
    decodes_s = sum(COST.step_s(0, 1, 101 + i) for i in range(4))
    assert outcome.finish_s == pytest.approx(3.0 + first_s + decodes_s)
    assert outcome.longest_gap_s == pytest.approx(COST.step_s(0, 1, 104))


def test_a_third_job_waits_for_a_slot() -> None:
    rows = [SimulatedRequest(0.0, 10, 50), SimulatedRequest(0.0, 10, 20), SimulatedRequest(0, 9, 3)]
    long, short, last = replay(rows, SMALL)
    assert last.first_token_s > short.finish_s
    assert last.finish_s < long.finish_s


def test_jobs_that_outgrow_the_cache_are_preempted_and_computed_again() -> None:
    tight = Hardware(COST, slots=4, kv_tokens=400, block_tokens=16, batched_tokens=512)
    outcomes = replay([SimulatedRequest(0.0, 60, 200) for _ in range(4)], tight)
    assert sum(o.preemptions for o in outcomes) > 0
    assert sum(o.recomputed_tokens for o in outcomes) > 0
    assert outcomes[0].preemptions == 0  # vLLM preempts the last one


class _SecondMakesRoom(FirstComeFirstServed):
    """FCFS, but after 30 steps job 1 loses its slot and waits behind all others."""

    def __init__(self) -> None:
        self._is_done = False

    def steer(self, replica: Replica) -> float:
        if replica.steps >= 30 and not self._is_done:
            self._is_done = True
            job = replica.running[1]
            replica.preempt(job)
            replica.rank(job, 1.0)
        return math.inf if self._is_done else replica.now_s + 0.05


@pytest.mark.parametrize(("kv_tokens", "recomputed"), [(4000, 2), (450, 98)])
def test_a_preempted_job_finds_what_nobody_has_overwritten(kv_tokens: int, recomputed: int) -> None:
    # It leaves 130 tokens, of which 8 blocks are full; others write 260 until it is back. Of 450
    # then 174 are free: 86 of its own are overwritten, and 2 blocks of the 44 left are full.
    hardware = Hardware(COST, slots=2, kv_tokens=kv_tokens, block_tokens=16, batched_tokens=512)
    rows = [(0.0, 150), (0.0, 100), (0.1, 80)]
    requests = [SimulatedRequest(arrival_s, 100, tokens) for arrival_s, tokens in rows]
    victim = replay(requests, hardware, _SecondMakesRoom())[1]
    assert victim.preemptions == 1
    assert victim.recomputed_tokens == recomputed


def test_a_request_that_fits_nowhere_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="request 1 needs 5016 tokens"):
        replay([SimulatedRequest(0.0, 10, 5), SimulatedRequest(0.0, 2500, 2500)], SMALL)


# The second comes in the last step but one of the first, and is with it in the last.
@example(
    [SimulatedRequest(17.12, 134, 43), SimulatedRequest(19.54182, 1, 1)],
    Hardware(StepCost(0.05, 0.001, 0.002, 1e-6), slots=2, kv_tokens=300, batched_tokens=45),
)
@settings(deadline=None)
@given(requests_of, hardware_of)
def test_many_steps_at_once_are_the_same_as_one_by_one(
    requests: list[SimulatedRequest], hardware: Hardware
) -> None:
    for fast, slow in zip(
        replay(requests, hardware), _step_by_step(requests, hardware), strict=True
    ):
        assert fast.finish_s == pytest.approx(slow[1], abs=1e-6)
        assert fast.first_token_s == pytest.approx(slow[0], abs=1e-6)


@settings(deadline=None)
@given(requests_of, hardware_of)
def test_every_request_ends_and_no_earlier_than_alone(
    requests: list[SimulatedRequest], hardware: Hardware
) -> None:
    for request, outcome in zip(requests, replay(requests, hardware), strict=True):
        alone_s = replay([request], hardware)[0].finish_s
        assert outcome.finish_s >= alone_s - 1e-6
        assert request.arrival_s < outcome.first_token_s <= outcome.finish_s
        assert 0 <= outcome.longest_gap_s <= outcome.finish_s - outcome.first_token_s + 1e-9
        assert outcome.recomputed_tokens <= outcome.preempted_tokens


def _step_by_step(
    requests: list[SimulatedRequest], hardware: Hardware
) -> list[tuple[float, float]]:
    """FCFS written down once more, a step at a time, with nothing clever in it."""
    times = [[math.nan, math.nan] for _ in requests]
    waiting: list[list[int]] = []  # [number, tokens out, tokens left behind, and until when]
    running: list[list[int]] = []  # [number, tokens out, tokens to compute]
    come, now, allocated = 0, 0.0, 0

    def used() -> int:
        context = sum(requests[job[0]].prompt_tokens + job[1] for job in running)
        return context + len(running) * hardware.block_tokens // 2

    while come < len(requests) or waiting or running:
        if not waiting and not running:
            now = max(now, requests[come].arrival_s)
        while come < len(requests) and requests[come].arrival_s <= now:
            waiting.append([come, 0, 0, 0])
            come += 1
        waiting.sort()
        decoding = sum(1 for job in running if not job[2])
        budget = hardware.batched_tokens - decoding - sum(job[2] for job in running)
        while waiting and len(running) < hardware.slots and budget > 0:
            number, out, cached, until = waiting[0]
            context = requests[number].prompt_tokens + out
            if context + hardware.block_tokens > hardware.kv_tokens - used() and running:
                break
            waiting.pop(0)
            cached = min(max(cached - max(allocated - until, 0), 0), context - 1)
            cached -= cached % hardware.block_tokens
            running.append([number, out, context - cached])
            allocated += context - cached
            budget -= context - cached
        while len(running) > 1 and hardware.kv_tokens - used() < len(running):
            victim = max(running)
            free = hardware.kv_tokens - used()
            running.remove(victim)
            computed = requests[victim[0]].prompt_tokens + victim[1] - victim[2]
            waiting.append([*victim[:2], computed, allocated + free])
        growing = [job for job in running if not job[2]]
        context = sum(requests[job[0]].prompt_tokens + job[1] for job in growing)
        decoding, prefilled = len(growing), 0
        for job in [job for job in running if job[2]]:
            tokens = min(job[2], hardware.batched_tokens - decoding - prefilled)
            prefilled += tokens
            job[2] -= tokens
            if not job[2]:
                growing.append(job)
        now += hardware.step.step_s(prefilled, decoding, context)
        allocated += decoding
        for job in growing:
            job[1] += 1
            if math.isnan(times[job[0]][0]):
                times[job[0]][0] = now
            if job[1] == requests[job[0]].output_tokens:
                times[job[0]][1] = now
                running.remove(job)
    return [(first, last) for first, last in times]
