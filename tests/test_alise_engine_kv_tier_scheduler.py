"""The KV tier in a real scheduler, with real copies: what is stored, restored, and kept private.

The harness checks the KV of every scheduled token's context in every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alise_engine import metrics
from alise_engine import scheduler as plugin
from alise_engine.client import Costs, Estimate
from alise_engine.kv_tier import metrics as tier_metrics
from alise_engine.kv_tier.layout import Quantization
from alise_engine.scheduler import AliseScheduler
from fakes import FakeClient
from kv_tier_harness import TierEngine, random_aborts
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus
from vllm_factories import create_request

Make = Callable[..., tuple[TierEngine, FakeClient]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("ALISE_SCHEDULER", "unix:///nobody.sock")
    monkeypatch.setattr(plugin, "SidecarClient", FakeClient)

    def create(**options: Any) -> tuple[TierEngine, FakeClient]:
        engine = TierEngine(AliseScheduler, tmp_path, **options)
        client = engine.scheduler._client
        # Copies here take microseconds, and computing a token is worth many of them.
        client.costs = Costs(prefill_s_per_token=0.01, decode_s_per_token=0.05)
        return engine, client

    return create


def add(engine: TierEngine, count: int = 1, **options: Any) -> list[Request]:
    requests = [create_request(**options) for _ in range(count)]
    for request in requests:
        engine.scheduler.add_request(request)
    return requests


def rank(client: FakeClient, request: Request, priority: float, tokens: float) -> None:
    client.estimates.append(
        Estimate(request.request_id, priority, tokens, request.num_output_tokens)
    )


def counted(counter: Any, *labels: str) -> float:
    return float((counter.labels(*labels) if labels else counter)._value.get())


def evict_prefix_cache(engine: TierEngine) -> None:
    """Take away what the device still remembers of freed blocks, as a full pool would."""
    manager: KVCacheManager = engine.scheduler.kv_cache_manager
    pool = manager.block_pool
    blocks = pool.get_new_blocks(pool.get_num_free_blocks())
    pool.free_blocks(reversed(blocks))


def preempt_one(
    engine: TierEngine, client: FakeClient, *, prompt_tokens: int = 100, steps: int = 30
) -> tuple[Request, Request]:
    """Return (a preempted long job, the short one that has its slot)."""
    (long,) = add(engine, prompt_tokens=prompt_tokens)
    for _ in range(steps):
        engine.step()
    rank(client, long, 1000.0, 900)
    (short,) = add(engine, prompt_tokens=20)
    rank(client, short, 0.0, 10)
    engine.step()
    assert long.status == RequestStatus.PREEMPTED
    return long, short


def finish(engine: TierEngine, request: Request) -> None:
    engine.step({request.request_id})


def test_a_job_in_the_batch_in_flight_is_preempted_stored_and_restored(make: Make) -> None:
    engine, client = make(slots=1, batches_in_flight=2)
    restored = counted(tier_metrics.RESTORED_TOKENS)
    long, short = preempt_one(engine, client)
    held = engine.tier.held_tokens(long)
    assert held == long.num_tokens - 1, "all but the token of the batch in flight"
    assert short.status == RequestStatus.RUNNING
    evict_prefix_cache(engine)
    finish(engine, short)
    for _ in range(6):
        engine.step()
    assert long.status == RequestStatus.RUNNING
    assert counted(tier_metrics.RESTORED_TOKENS) - restored == held


def test_blocks_that_a_batch_in_flight_still_writes_are_counted_once(make: Make) -> None:
    # Two slots, but blocks for little more than one long job: the short one waits for blocks.
    engine, client = make(slots=3, blocks=41, batches_in_flight=2)
    preempted = counted(metrics.PREEMPTIONS)
    jobs = add(engine, 2, prompt_tokens=300)
    for _ in range(5):
        engine.step()
    for number, job in enumerate(jobs):
        rank(client, job, 1000.0 + number, 900)
    (short,) = add(engine, prompt_tokens=100)
    rank(client, short, 0.0, 10)
    for _ in range(3):
        engine.step()
    assert short.status == RequestStatus.RUNNING
    assert [job.status for job in jobs] == [RequestStatus.RUNNING, RequestStatus.PREEMPTED]
    engine.scheduler._report(client)
    assert counted(metrics.PREEMPTIONS) == preempted + 1


@pytest.mark.parametrize("quantization", Quantization)
def test_a_preempted_job_comes_back_without_being_computed_again(
    make: Make, quantization: Quantization
) -> None:
    engine, client = make(slots=1, quantization=quantization)
    restored = counted(tier_metrics.RESTORED_TOKENS)
    recomputed = counted(metrics.RECOMPUTED_TOKENS)
    long, short = preempt_one(engine, client)
    assert engine.tier.held_tokens(long) == 129
    finish(engine, short)
    evict_prefix_cache(engine)
    for _ in range(4):
        engine.step()
    assert long.status == RequestStatus.RUNNING
    assert counted(tier_metrics.RESTORED_TOKENS) - restored == 129
    engine.scheduler._report(client)
    assert counted(metrics.RECOMPUTED_TOKENS) == recomputed
    finish(engine, long)
    engine.settle()
    assert engine.tier.manager.used_slots() == 0


def test_what_the_device_still_remembers_is_not_loaded(make: Make) -> None:
    engine, client = make(slots=1)
    restored = counted(tier_metrics.RESTORED_TOKENS)
    long, short = preempt_one(engine, client)
    finish(engine, short)
    for _ in range(3):
        engine.step()
    assert long.status == RequestStatus.RUNNING
    assert counted(tier_metrics.RESTORED_TOKENS) == restored + 1  # the last block is not full


def test_a_lossy_block_never_reaches_another_job(make: Make) -> None:
    engine, client = make(slots=1)
    long, short = preempt_one(engine, client)
    finish(engine, short)
    evict_prefix_cache(engine)
    for _ in range(4):
        engine.step()
    assert long.request_id in engine.restored_jobs
    finish(engine, long)
    twin = create_request(prompt_token_ids=list(long.all_token_ids))
    engine.scheduler.add_request(twin)
    engine.step()  # the harness demands exact KV of a job that was not restored itself
    engine.step()
    assert twin.status == RequestStatus.RUNNING


@pytest.mark.parametrize("prompt_tokens", [3, 9, 30, 100])
def test_nor_does_what_was_computed_with_it(make: Make, prompt_tokens: int) -> None:
    # The device remembers all full blocks: only the last, unfilled one is restored.
    engine, client = make(slots=1)
    long, short = preempt_one(engine, client, prompt_tokens=prompt_tokens, steps=5)
    finish(engine, short)
    for _ in range(40):
        engine.step()
    assert long.request_id in engine.restored_jobs
    finish(engine, long)
    twin = create_request(prompt_token_ids=list(long.all_token_ids))
    engine.scheduler.add_request(twin)
    engine.step()
    engine.step()
    assert twin.status == RequestStatus.RUNNING


def test_exact_blocks_are_shared_as_vllm_shares_them(make: Make) -> None:
    engine, client = make(slots=1, quantization=Quantization.NONE)
    long, short = preempt_one(engine, client)
    finish(engine, short)
    evict_prefix_cache(engine)
    hashes = list(long.block_hashes)
    for _ in range(4):
        engine.step()
    assert long.request_id in engine.restored_jobs
    assert long.block_hashes[: len(hashes)] == hashes


def test_a_likely_victim_is_stored_ahead_in_small_parts(make: Make) -> None:
    engine, client = make(slots=1)
    engine.scheduler._step_s = 1e-4
    (long,) = add(engine, prompt_tokens=400)
    for _ in range(3):
        engine.step()
    rank(client, long, 0.0, 900)
    (other,) = add(engine)
    rank(client, other, 1.0, 900)  # waits, and may not preempt
    engine.step()
    engine.step()
    first = engine.tier.held_tokens(long)
    for _ in range(60):
        engine.step()
    assert long.status == RequestStatus.RUNNING
    assert first < engine.tier.held_tokens(long)


def test_nobody_is_stored_ahead_for_a_job_that_waits_for_tokens_alone(make: Make) -> None:
    engine, client = make(slots=4, max_num_batched_tokens=64)
    engine.scheduler._step_s = 1.0
    (long,) = add(engine, prompt_tokens=60)
    for _ in range(20):
        engine.step()
    others = add(engine, 2, prompt_tokens=600)
    rank(client, long, 0.0, 900)
    for other in others:
        rank(client, other, 1.0, 900)
    for _ in range(9):
        engine.step()
        assert len(engine.scheduler.waiting) == 1
    assert engine.tier.held_tokens(long) == 0


def test_a_job_is_loaded_before_its_turn(make: Make) -> None:
    engine, client = make(slots=1)
    in_time = counted(tier_metrics.PREFETCHES, "in_time")
    long, short = preempt_one(engine, client)
    evict_prefix_cache(engine)
    engine.scheduler._step_s = 0.05
    rank(client, short, 0.0, 1)  # is about to end
    engine.step()
    assert long.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert short.status == RequestStatus.RUNNING
    engine.step({short.request_id})
    engine.step()
    assert long.status == RequestStatus.RUNNING
    engine.step()
    assert counted(tier_metrics.PREFETCHES, "in_time") == in_time + 1


def test_slow_copies_leave_a_job_to_be_computed_again(make: Make) -> None:
    engine, client = make(slots=1)
    engine.tier._bytes_per_s = {"store": 1.0, "load": 1.0}
    long, _ = preempt_one(engine, client)
    assert engine.tier.held_tokens(long) == 0


@pytest.mark.parametrize("ending", ["loaded", "aborted"])
def test_a_slot_is_kept_for_the_job_that_is_loaded_for_it(make: Make, ending: str) -> None:
    engine, client = make(slots=1)
    long, short = preempt_one(engine, client)
    evict_prefix_cache(engine)
    (next_one,) = add(engine)
    rank(client, next_one, 2000.0, 900)
    engine.step({short.request_id})
    engine.step()
    assert long.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert next_one.status == RequestStatus.WAITING
    if ending == "aborted":
        engine.scheduler.finish_requests(long.request_id, RequestStatus.FINISHED_ABORTED)
    engine.step()
    engine.step()
    runs, waits = (long, next_one) if ending == "loaded" else (next_one, long)
    assert engine.scheduler.running == [runs]
    assert waits.status != RequestStatus.RUNNING
    assert engine.scheduler.max_num_active_reqs == 1


def test_copies_that_are_believed_too_slow_are_measured_again(make: Make) -> None:
    engine, client = make(slots=1)
    costs = engine.tier.costs()
    # So slow that out and in takes three times as long as computing.
    for direction in ("store", "load"):
        is_s = getattr(costs, f"{direction}_s_per_token")
        engine.tier._bytes_per_s[direction] *= is_s / (1.5 * client.costs.prefill_s_per_token)
    believed = engine.tier._bytes_per_s["load"]
    long, short = preempt_one(engine, client, steps=5)
    preemptions = 1
    while not engine.tier.held_tokens(long) and preemptions < 40:
        ids = [long.request_id, short.request_id]
        engine.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
        engine.settle()
        long, short = preempt_one(engine, client, steps=5)
        preemptions += 1
    assert 17 <= preemptions <= 18
    finish(engine, short)
    evict_prefix_cache(engine)
    for _ in range(4):
        engine.step()
    assert long.request_id in engine.restored_jobs
    assert engine.tier._bytes_per_s["load"] > 10 * believed
    assert engine.tier._refusals == 0


def test_damage_in_host_memory_is_computed_again(make: Make) -> None:
    engine, client = make(slots=1)
    failed = counted(tier_metrics.CHECKSUM_FAILURES)
    long, short = preempt_one(engine, client)
    engine.worker._memory.rows[:, 7] ^= 1
    finish(engine, short)
    evict_prefix_cache(engine)
    for _ in range(6):
        engine.step()
    assert long.status == RequestStatus.RUNNING
    assert counted(tier_metrics.CHECKSUM_FAILURES) == failed + 1
    assert engine.tier.manager.why_incomplete(long.request_id) == "failed"


def test_damage_in_the_middle_keeps_what_is_before_it(make: Make) -> None:
    engine, client = make(slots=1)
    long, short = preempt_one(engine, client)
    slots = [block.slot for block in engine.tier.manager._copies[long.request_id].blocks.values()]
    engine.worker._memory.rows[slots[3], 7] ^= 1
    finish(engine, short)
    evict_prefix_cache(engine)
    for _ in range(6):
        engine.step()
    assert long.status == RequestStatus.RUNNING
    assert engine.tier.held_tokens(long) == 48


def test_an_aborted_job_frees_its_slots(make: Make) -> None:
    engine, client = make(slots=1)
    long, _ = preempt_one(engine, client)
    assert engine.tier.manager.used_slots() > 0
    engine.scheduler.finish_requests(long.request_id, RequestStatus.FINISHED_ABORTED)
    engine.settle()
    assert engine.tier.manager.used_slots() == 0


def test_a_reset_of_the_prefix_cache_forgets_the_tier(make: Make) -> None:
    engine, client = make(slots=1)
    long, _ = preempt_one(engine, client)
    engine.scheduler.reset_connector_cache()
    assert engine.tier.manager.used_slots() == 0
    engine.settle()
    assert long.status == RequestStatus.PREEMPTED


@pytest.mark.parametrize("batches_in_flight", [1, 2], ids=["sync", "async"])
def test_vllms_own_preemptions_use_the_tier(make: Make, batches_in_flight: int) -> None:
    # Blocks for two long answers, not for four; nobody is ranked.
    engine, _ = make(slots=4, blocks=41, host_bytes=1 << 20, batches_in_flight=batches_in_flight)
    preempted = counted(metrics.PREEMPTED_TOKENS)
    restored = counted(tier_metrics.RESTORED_TOKENS)
    requests = add(engine, 4, prompt_tokens=100, max_tokens=200)
    engine.run(len(requests))
    engine.settle()
    assert counted(metrics.PREEMPTED_TOKENS) > preempted
    assert counted(tier_metrics.RESTORED_TOKENS) > restored
    assert engine.tier.manager.used_slots() == 0


class Faults:
    """Breaks copies now and then: errors on both ways, and flipped bits in host memory."""

    def __init__(self, engine: TierEngine, generator: random.Random) -> None:
        self._generator = generator
        self._memory = engine.worker._memory
        codec = engine.worker._codec
        for name in ("encode", "decode"):
            setattr(codec, name, self._breaking(getattr(codec, name)))

    def _breaking(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if self._generator.random() < 0.02:
                raise RuntimeError("injected")
            function(*args)

        return call

    def flip_a_bit(self) -> None:
        rows = self._memory.rows
        rows[self._generator.randrange(rows.shape[0]), self._generator.randrange(100)] ^= 4


@pytest.mark.parametrize("batches_in_flight", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("has_faults", [False, True], ids=["whole", "faults"])
def test_under_pressure_every_answer_is_right_and_nothing_leaks(
    make: Make, has_faults: bool, batches_in_flight: int
) -> None:
    """500 jobs on a pool for about three, a tier for about one, random ranks, aborts, faults."""
    engine, client = make(
        slots=8, blocks=60, host_bytes=64 << 10, batches_in_flight=batches_in_flight
    )
    generator = random.Random(7)
    free_before = engine.free_blocks()
    faults = Faults(engine, generator) if has_faults else None
    restored = counted(tier_metrics.RESTORED_TOKENS)
    to_come, aborted = 500, set()
    while to_come or engine.scheduler.has_unfinished_requests():
        assert engine.steps < 30_000, "no end"
        if to_come and generator.random() < 0.3:
            to_come -= 1
            (request,) = add(
                engine,
                prompt_tokens=generator.randrange(5, 150),
                max_tokens=generator.randrange(1, 120),
            )
            rank(client, request, generator.random() * 100, generator.randrange(1, 300))
        for request in list(engine.scheduler.requests.values()):
            if generator.random() < 0.02 and not request.is_finished():
                rank(client, request, generator.random() * 100, generator.randrange(1, 300))
        if generator.random() < 0.05:
            aborted |= random_aborts(engine, generator, 0.1)
        if faults is not None and generator.random() < 0.2:
            faults.flip_a_bit()
        engine.step()
    engine.settle()
    engine.drain()
    assert len(engine.finished.keys() | aborted) == 500
    assert engine.free_blocks() == free_before
    assert engine.tier.manager.used_slots() == 0
    assert not engine.tier._jobs
    assert not engine.tier._req_status
    assert counted(tier_metrics.RESTORED_TOKENS) > restored
