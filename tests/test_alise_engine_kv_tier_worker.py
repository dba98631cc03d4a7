"""Copies between KV pages and host memory: exactness, error, damage and faults."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from alise_engine.kv_tier import host_memory
from alise_engine.kv_tier import worker as worker_module
from alise_engine.kv_tier.host_memory import HostMemory
from alise_engine.kv_tier.layout import Quantization, SlotLayout
from alise_engine.kv_tier.manager import HostSlots
from alise_engine.kv_tier.pages import cpu_pages, stacked
from alise_engine.kv_tier.worker import TierWorker
from vllm.v1.kv_offload.base import GPULoadStoreSpec

LAYERS, BLOCKS, HEADS, TOKENS, GROUP = 3, 40, 2, 32, 16
ELEMENTS = HEADS * TOKENS * 2 * GROUP


def layout(quantization: Quantization, dtype: torch.dtype) -> SlotLayout:
    return SlotLayout(LAYERS, ELEMENTS, dtype.itemsize, GROUP, quantization)


def make(
    quantization: Quantization = Quantization.INT8, dtype: torch.dtype = torch.bfloat16
) -> tuple[TierWorker, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(LAYERS, BLOCKS, ELEMENTS, generator=generator).to(dtype)
    caches = list(pages.view(LAYERS, BLOCKS, HEADS, TOKENS, 2 * GROUP))
    views = cpu_pages(stacked(caches, TOKENS), GROUP)
    return TierWorker(views, layout(quantization, dtype), slots=30), pages


def device(blocks: list[int]) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[0])


def round_trip(worker: TierWorker, source: list[int], target: list[int]) -> None:
    slots = HostSlots(list(range(5, 5 + len(source))))
    assert worker.submit_store(1, device(source), slots)
    assert worker.submit_load(2, slots, device(target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_int8_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    worker, pages = make(dtype=dtype)
    source, target = list(range(20)), list(range(20, 40))  # more than one staging
    round_trip(worker, source, target)
    for page in pages:
        exact = page[source].float().view(20, -1, GROUP)
        error = (page[target].float().view(20, -1, GROUP) - exact).abs()
        step = exact.abs().amax(-1, keepdim=True) / 127
        rounding = torch.finfo(dtype).eps * exact.abs()
        assert bool((error <= 0.51 * step + rounding).all())
    assert worker.take_invalid_blocks() == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_without_quantization_every_bit_returns(dtype: torch.dtype) -> None:
    worker, pages = make(Quantization.NONE, dtype)
    round_trip(worker, list(range(20)), list(range(39, 19, -1)))
    for page in pages:
        assert torch.equal(page[:20], page[20:].flip(0))


def test_zeros_and_tiny_numbers_survive() -> None:
    worker, pages = make(dtype=torch.float32)
    pages[0][0] = 0.0
    pages[0][1] = 1e-12
    round_trip(worker, [0, 1], [10, 11])
    assert bool((pages[0][10] == 0).all())
    assert bool((pages[0][11].abs() <= 1e-4).all())


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_numbers_that_int8_cannot_hold_are_a_miss(value: float) -> None:
    worker, pages = make(dtype=torch.float32)
    pages[1][3, 17] = value
    round_trip(worker, [2, 3, 4], [20, 21, 22])
    assert worker.take_invalid_blocks() == {21, 22}


def test_a_flipped_bit_is_a_miss_from_there_on() -> None:
    worker, pages = make()
    slots = HostSlots([5, 6, 7])
    worker.submit_store(1, device([0, 1, 2]), slots)
    worker._memory.rows[6, 100] ^= 1
    before = pages[0][21:23].clone()
    worker.submit_load(2, slots, device([20, 21, 22]))
    assert worker.take_invalid_blocks() == {21, 22}
    assert torch.equal(pages[0][21:23], before)
    assert worker.take_invalid_blocks() == set()
    assert {result.job_id for result in worker.get_finished()} == {1, 2}


def test_a_slot_that_was_never_written_is_a_miss() -> None:
    worker, _ = make()
    worker.submit_load(2, HostSlots([9]), device([20]))
    assert worker.take_invalid_blocks() == {20}


def test_a_store_that_fails_is_a_miss_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = make()
    slots = HostSlots([5, 6])
    worker.submit_store(0, device([8, 9]), slots)  # older content must not be taken for the new

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(worker._codec, "encode", fail)
    with caplog.at_level(logging.ERROR, logger=worker_module.logger.name):
        assert worker.submit_store(1, device([0, 1]), slots)
    worker.submit_load(2, slots, device([20, 21]))
    assert worker.take_invalid_blocks() == {20, 21}
    assert all(result.success for result in worker.get_finished())


def test_a_load_that_fails_reports_all_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = make()
    slots = HostSlots([5, 6])
    worker.submit_store(1, device([0, 1]), slots)

    def fail(*_: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(worker._codec, "decode", fail)
    worker.submit_load(2, slots, device([20, 21]))
    assert worker.take_invalid_blocks() == {20, 21}


def test_transfers_report_bytes_and_seconds() -> None:
    worker, _ = make()
    worker.submit_store(7, device([0, 1]), HostSlots([5, 6]))
    (result,) = worker.get_finished()
    assert (result.job_id, result.success) == (7, True)
    assert result.transfer_size == 2 * worker._layout.slot_bytes
    assert result.transfer_time > 0
    assert worker.get_finished() == []


class FakeStream:
    """Notes what it is asked to do, in `done`."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def wait_stream(self, _: Any) -> None:
        self._done.append("wait")


def test_a_copys_time_begins_after_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class FakeEvent:
        def __init__(self, **_: Any) -> None:
            pass

        def record(self, _: Any) -> None:
            done.append("mark")

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    worker, _ = make()
    worker._stream = FakeStream(done)  # type: ignore[assignment]
    worker.submit_store(1, device([0, 1]), HostSlots([5, 6]))
    assert done == ["wait", "mark", "mark"]
    done.clear()
    worker.submit_load(2, HostSlots([]), device([]))
    assert done == ["wait", "mark", "mark"]


def test_pinned_memory_is_what_was_asked_for_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(host_memory, "pin_tensor", pinned.append)
    memory = HostMemory(3, 100, is_pinned=True)
    assert [rows.data_ptr() for rows in pinned] == [memory.rows.data_ptr()]
    assert memory.rows.untyped_storage().nbytes() == 300
    HostMemory(3, 100, is_pinned=False)
    assert len(pinned) == 1
