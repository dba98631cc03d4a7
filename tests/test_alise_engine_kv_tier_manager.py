"""The host tier's index: slots, privacy, and copies that shrink from their tails."""

from __future__ import annotations

import pytest
from alise_engine.kv_tier.layout import (
    Quantization,
    SlotLayout,
    TierTooSmallError,
    slots_within,
)
from alise_engine.kv_tier.manager import HostTierManager, tail_key
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext

LLAMA_8B = SlotLayout(
    layers=32,
    page_elements=16 * 8 * 2 * 128,
    element_bytes=2,
    group=128,
    quantization=Quantization.INT8,
)


def context(job_id: str) -> ReqContext:
    return ReqContext(req_id=job_id)


def keys(count: int, start: int = 0) -> list[OffloadKey]:
    return [OffloadKey(f"key {i}".encode()) for i in range(start, start + count)]


def store(manager: HostTierManager, job_id: str, blocks: int) -> None:
    new_keys = keys(blocks, manager.blocks_of(job_id))
    assert manager.prepare_store(new_keys, context(job_id)) is not None
    manager.complete_store(new_keys, context(job_id))


def test_a_copy_is_found_by_its_own_job_only() -> None:
    manager = HostTierManager(8)
    store(manager, "a", 2)
    assert [manager.lookup(k, context("a")) for k in keys(3)] == [
        LookupResult.HIT,
        LookupResult.HIT,
        LookupResult.MISS,
    ]
    assert manager.lookup(keys(1)[0], context("b")) == LookupResult.MISS


def test_a_block_can_be_read_when_it_is_written() -> None:
    manager = HostTierManager(8)
    manager.prepare_store(keys(1), context("a"))
    assert manager.lookup(keys(1)[0], context("a")) == LookupResult.HIT_PENDING


def test_no_more_slots_than_there_are() -> None:
    manager = HostTierManager(3)
    store(manager, "a", 2)
    assert manager.prepare_store(keys(2), context("b")) is None
    assert manager.make_room("b", 2, is_running=True) == 1
    assert manager.used_slots() == 2


def test_room_is_made_from_the_tail_of_who_waits_longest() -> None:
    manager = HostTierManager(4)
    store(manager, "soon", 2)
    store(manager, "late", 2)
    manager.waiting_times = lambda _: {"soon": 1.0, "late": 30.0, "new": 10.0}
    assert manager.make_room("new", 3, is_running=False) == 2
    assert manager.blocks_of("late") == 0
    assert manager.why_incomplete("late") == "evicted"
    assert manager.blocks_of("soon") == 2


def test_blocks_that_are_read_or_written_are_not_evicted() -> None:
    manager = HostTierManager(4)
    manager.waiting_times = lambda _: {"new": 1.0}
    store(manager, "read", 2)
    manager.prepare_load(keys(1), context("read"))
    manager.prepare_store(keys(2), context("written"))
    assert manager.make_room("new", 4, is_running=False) == 1  # the second block of "read"
    manager.complete_load(keys(1), context("read"))
    assert manager.make_room("new", 4, is_running=False) == 2


def test_a_tail_is_the_last_block_and_goes_when_its_job_runs_again() -> None:
    manager = HostTierManager(4)
    store(manager, "a", 2)
    manager.prepare_store([tail_key(40)], context("a"))
    manager.complete_store([tail_key(40)], context("a"))
    assert (manager.blocks_of("a"), manager.tail_of("a")) == (2, 40)
    manager.prepare_load([tail_key(40)], context("a"))
    manager.drop_tail("a")  # is just being read
    assert manager.tail_of("a") == 40
    manager.complete_load([tail_key(40)], context("a"))
    assert (manager.blocks_of("a"), manager.tail_of("a"), manager.used_slots()) == (2, None, 2)


def test_a_tail_is_evicted_first() -> None:
    manager = HostTierManager(3)
    manager.waiting_times = lambda _: {"new": 1.0}
    store(manager, "a", 2)
    manager.prepare_store([tail_key(40)], context("a"))
    manager.complete_store([tail_key(40)], context("a"))
    assert manager.make_room("new", 1, is_running=False) == 1
    assert (manager.blocks_of("a"), manager.tail_of("a")) == (2, None)


def test_an_ended_job_frees_its_slots_when_the_copies_have_ended() -> None:
    manager = HostTierManager(4)
    store(manager, "a", 1)
    manager.prepare_store(keys(1, 1), context("a"))
    manager.on_request_finished(context("a"))
    assert manager.used_slots() == 2
    manager.complete_store(keys(1, 1), context("a"))
    assert manager.used_slots() == 0
    store(manager, "b", 2)
    manager.prepare_load(keys(2), context("b"))
    manager.on_request_finished(context("b"))
    assert manager.used_slots() == 2
    manager.complete_load(keys(2), context("b"))
    assert manager.used_slots() == 0


def test_what_could_not_be_read_is_dropped() -> None:
    manager = HostTierManager(4)
    store(manager, "a", 4)
    manager.drop_after("a", 1, "failed")
    assert (manager.blocks_of("a"), manager.why_incomplete("a")) == (1, "failed")
    assert manager.used_slots() == 1


def test_a_reset_forgets_everything() -> None:
    manager = HostTierManager(4)
    store(manager, "a", 4)
    manager.reset_cache()
    assert manager.used_slots() == 0
    assert manager.lookup(keys(1)[0], context("a")) == LookupResult.MISS


def test_a_slot_takes_about_half_of_bfloat16() -> None:
    bfloat16_bytes = LLAMA_8B.layers * LLAMA_8B.page_elements * 2
    assert LLAMA_8B.bytes_per_slot / bfloat16_bytes < 0.51
    smollm2 = SlotLayout(30, 16 * 3 * 2 * 64, 2, 64, Quantization.INT8)
    assert smollm2.bytes_per_slot / (smollm2.layers * smollm2.page_elements * 2) < 0.53


def test_the_bound_holds_with_all_overhead() -> None:
    slots = slots_within(1 << 30, 2, LLAMA_8B, staging_slots=8)
    assert (slots + 8) * LLAMA_8B.bytes_per_slot * 2 <= 1 << 30
    assert (slots + 9) * LLAMA_8B.bytes_per_slot * 2 > 1 << 30


def test_a_bound_that_holds_nothing_says_what_to_do() -> None:
    with pytest.raises(TierTooSmallError, match="--alise-kv-host-gib: 1 MiB hold no KV block"):
        slots_within(1 << 20, 1, LLAMA_8B, staging_slots=8)
