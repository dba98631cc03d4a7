"""The shadow: the jobs that came, served by a model of the engine in the order of arrival."""

from __future__ import annotations

import json
import random
import urllib.request
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from alise_scheduler.cost_model import StepCost
from alise_scheduler.engine_state import Introduction
from alise_scheduler.events import StepTiming
from alise_scheduler.history import PastJob
from alise_scheduler.replica import Hardware, SimulatedRequest, replay
from alise_scheduler.shadow import MIN_JOBS, Pair, Shadow, ratios
from alise_scheduler.shadow_runner import EngineShadow, Feed
from alise_scheduler.v1 import scheduler_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import eventually
from status_harness import STEP, sidecar_page

COST = StepCost(0.05, 1e-3, 2e-3, 1e-6)
SMALL = Hardware(COST, slots=2, kv_tokens=4000, block_tokens=16, batched_tokens=64)

rows_of = st.lists(
    st.tuples(st.floats(0.0, 20.0), st.integers(1, 150), st.integers(1, 60), st.floats(0.1, 50)),
    min_size=1,
    max_size=15,
    unique_by=lambda row: row[0],
)


def past(row: tuple[float, int, int, float], *, is_complete: bool = True) -> PastJob:
    arrival_s, prompt, output, jct_s = row
    return PastJob(arrival_s, prompt, output, arrival_s + jct_s, is_complete)


@settings(deadline=None)
@given(rows_of, st.integers(1, 5))
def test_bit_by_bit_it_comes_to_what_one_replay_of_all_says(
    rows: list[tuple[float, int, int, float]], patience: int
) -> None:
    expected = replay([SimulatedRequest(*row[:3]) for row in sorted(rows)], SMALL)
    shadow = Shadow()
    by_end = sorted(rows, key=lambda row: row[0] + row[3])
    for index, row in enumerate(by_end):
        shadow.add(past(row))
        live_s = [other[0] for other in by_end[index + 1 :]]
        asked = count()
        shadow.advance(
            min([*live_s, row[0] + row[3]]), SMALL, lambda asked=asked: next(asked) < patience
        )
    shadow.advance(1e6, SMALL)
    found = sorted(pair.fcfs_jct_s for pair in shadow.pairs)
    assert found == pytest.approx(sorted(o.finish_s - o.arrival_s for o in expected), abs=1e-6)


def test_jobs_that_were_given_up_are_load_and_not_compared() -> None:
    with_it, without = Shadow(), Shadow()
    given_up, other = (0.0, 10, 50, 9.0), (0.1, 10, 50, 9.0)
    one_slot = Hardware(COST, slots=1, kv_tokens=4000)
    with_it.add(past(given_up, is_complete=False))
    for shadow in (with_it, without):
        shadow.add(past(other))
        shadow.advance(1e6, one_slot)
    (slow,), (fast,) = with_it.pairs, without.pairs
    assert slow.fcfs_jct_s > fast.fcfs_jct_s


def test_it_waits_for_the_oldest_job_that_lives() -> None:
    shadow = Shadow()
    shadow.add(past((5.0, 10, 5, 1.0)))
    shadow.advance(5.0, SMALL)  # one that came at 5 s lives: what it needs is not known
    assert not shadow.pairs
    shadow.advance(100.0, SMALL)
    assert len(shadow.pairs) == 1


def test_what_cannot_be_modelled_is_left_out() -> None:
    shadow = Shadow()
    shadow.add(past((1.0, 10, 0, 1.0)))  # no token came out
    shadow.add(PastJob(1.0, 10, 5, 0.0, True))  # the engine told no time
    shadow.add(past((1.0, 9000, 5, 1.0)))  # more than the cache holds
    shadow.add(past((1.0, 10, 5, 1.0)))
    shadow.advance(1e6, SMALL)
    assert len(shadow.pairs) == 1


def test_a_shadow_that_falls_behind_for_good_starts_over() -> None:
    shadow = Shadow()
    for index in range(20_001):
        shadow.add(past((float(index), 10, 5, 1.0)))
    assert shadow.restarts == 1
    shadow.advance(1e6, SMALL)
    assert len(shadow.pairs) == 1


def test_ratios_are_over_the_same_jobs() -> None:
    pairs = [Pair(2.0, 4.0, 10)] * (MIN_JOBS - 1)
    assert ratios(pairs) is None
    found = ratios([*pairs, Pair(8.0, 4.0, 10)])
    assert found is not None
    assert found.jobs == MIN_JOBS
    assert found.mean_jct == pytest.approx((49 * 2 + 8) / 200)
    assert found.mean_normalized_latency == pytest.approx(found.mean_jct)
    assert 0.5 < found.p99_jct < 2


def test_an_engine_that_verifies_drafts_has_no_shadow() -> None:
    told = Introduction("m", slots=2, kv_tokens=4000)
    step = StepTiming(0, 2, 100, 0.05)
    ended = [past((float(second), 10, 5, 1.0)) for second in range(60)]
    one = EngineShadow()
    one.advance(Feed("e", ended, [step] * 128, 1e6, told))
    assert len(one.shadow.pairs) == 60
    one.advance(Feed("e", ended, [replace(step, decoded_tokens=5)], 1e6, told))
    one.advance(Feed("e", ended, [step] * 128, 1e6, told))
    assert not one.shadow.pairs


def test_the_sidecar_says_what_fcfs_would_have_done(tmp_path: Path) -> None:
    """Jobs whose times are a replay's own under FCFS: the ratio is 1."""
    rng = random.Random(3)
    arrivals = sorted(rng.uniform(0, 40) for _ in range(80))
    requests = [SimulatedRequest(a, 8, rng.randint(1, 60)) for a in arrivals]
    step = StepCost(0.03, 1e-7, 0.0)
    outcomes = replay(requests, Hardware(step, slots=4, kv_tokens=8000))
    with sidecar_page(tmp_path) as engine:
        engine.connect(slots=4, kv_tokens=8000)
        engine.send(*[pb.Event(step=STEP)] * 128)
        prompt = pb.Prompt(token_ids=[50] * 8, prompt_tokens=8)
        for index, outcome in enumerate(outcomes):
            job = pb.JobArrived(job_id=str(index), arrival_s=outcome.arrival_s, prompt=prompt)
            end = pb.JobFinished(
                job_id=str(index),
                reason=pb.FINISH_REASON_STOP,
                output_tokens=outcome.output_tokens,
                finish_s=outcome.finish_s,
            )
            engine.send(pb.Event(arrived=job), pb.Event(finished=end))

        def shadow() -> dict[str, float] | None:
            with urllib.request.urlopen(engine.url + "/api/v1/status", timeout=120) as answer:
                found: dict[str, float] | None = json.loads(answer.read())["shadow"]
                return found

        found = eventually(lambda: (s := shadow()) and s["jobs"] == 80 and s)
        assert found["mean_jct_ratio"] == pytest.approx(1.0, abs=0.05)
        with urllib.request.urlopen(engine.url + "/metrics", timeout=120) as answer:
            assert 'alise_shadow_ratio{measure="p99_jct"}' in answer.read().decode()
