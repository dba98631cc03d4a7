"""Copies KV blocks between the device and the host tier. Worker side, one per GPU (or the CPU).

Device-neutral torch. On CUDA, copies run on a stream of their own, ordered against the model's by
events, and the host waits for none of them; on the CPU they run where they are submitted. It
never fails a request: a store that fails leaves slots that no load accepts, and a load that fails
reports its blocks as not loaded, which vLLM then computes again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult

from alise_engine.kv_tier import metrics
from alise_engine.kv_tier.host_memory import HostMemory
from alise_engine.kv_tier.layout import SlotLayout
from alise_engine.kv_tier.manager import HostSlots
from alise_engine.kv_tier.pages import KvPages
from alise_engine.kv_tier.quantization import BlockCodec

logger = logging.getLogger("vllm.alise.kv_tier")

STAGING_SLOTS = 8
"""Blocks that a GPU packs at a time, into memory of its own; a CPU packs into the slot itself."""
_ERROR_SAMPLE_EVERY = 64
"""Of so many stores, one measures its quantization error."""


@dataclass(slots=True)
class _Transfer:
    job_id: int
    is_load: bool
    blocks: int
    began: Any  # torch.cuda.Event, or seconds
    ended: Any
    slots: Sequence[int] = ()
    """Of a store: to seal when it has ended."""
    relative_error: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    """Staging memory that must live until the copy has ended."""


class TierWorker(OffloadingWorker):  # type: ignore[misc]  # vLLM is untyped to us
    """Stores and loads blocks of `pages`.

    Args:
        pages: the KV cache, in its own dtype.
        layout: of a slot.
        slots: how many there are.

    """

    def __init__(self, pages: KvPages, layout: SlotLayout, slots: int) -> None:
        self._layout = layout
        self._device = pages.whole.device
        self._is_cuda = self._device.type == "cuda"
        self._memory = HostMemory(slots, layout.slot_bytes, is_pinned=self._is_cuda)
        self._codec = BlockCodec(layout, STAGING_SLOTS if self._is_cuda else 1, pages)
        self._stream = torch.cuda.Stream(self._device) if self._is_cuda else None
        self._transfers: list[_Transfer] = []
        self._invalid_blocks: set[int] = set()
        self._stores = 0

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: HostSlots) -> bool:
        """Copy blocks to the host; vLLM keeps them from being written until it has ended."""
        transfer = self._begin(job_id, len(dst_spec.slots), is_load=False)
        transfer.slots = dst_spec.slots
        try:
            with self._on_stream():
                self._store(src_spec.block_ids.tolist(), transfer, dst_spec.tail_tokens)
        except Exception:
            logger.exception(
                "Storing %d KV blocks failed; they will be recomputed", len(transfer.slots)
            )
            metrics.FAILURES.labels("store").inc()
            self._spoil(transfer)
        self._end(transfer)
        return True

    def submit_load(self, job_id: int, src_spec: HostSlots, dst_spec: GPULoadStoreSpec) -> bool:
        """Copy blocks to the device, up to the first that is damaged."""
        block_ids = dst_spec.block_ids.tolist()
        intact = self._intact_prefix(src_spec.slots)
        transfer = self._begin(job_id, intact, is_load=True)
        try:
            with self._on_stream():
                self._load(src_spec.slots[:intact], block_ids[:intact], transfer)
        except Exception:
            logger.exception("Loading KV blocks failed; they will be recomputed")
            metrics.FAILURES.labels("load").inc()
            intact = 0
        self._invalid_blocks.update(block_ids[intact:])
        self._end(transfer)
        return True

    def take_invalid_blocks(self) -> set[int]:
        """Return the device blocks that loads since the last call could not fill."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def get_finished(self) -> list[TransferResult]:
        """Return the transfers that have ended since the last call."""
        finished, pending = [], []
        for transfer in self._transfers:
            if self._is_cuda and not transfer.ended.query():
                pending.append(transfer)
            else:
                finished.append(self._finish(transfer))
        self._transfers = pending
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Order what the device does next after these transfers."""
        if self._is_cuda:
            for transfer in self._transfers:
                if transfer.job_id in job_ids:
                    torch.cuda.current_stream(self._device).wait_event(transfer.ended)

    # Copies.

    def _store(self, blocks: Sequence[int], transfer: _Transfer, tail_tokens: int | None) -> None:
        self._stores += 1
        rows = self._memory.rows
        if not self._is_cuda:
            for place, (block, slot) in enumerate(zip(blocks, transfer.slots, strict=True)):
                is_last = place == len(blocks) - 1
                self._codec.encode([block], rows[slot : slot + 1], tail_tokens if is_last else None)
        else:
            for start in range(0, len(blocks), STAGING_SLOTS):
                part = blocks[start : start + STAGING_SLOTS]
                staging = self._staging(len(part), transfer)
                is_last = start + STAGING_SLOTS >= len(blocks)
                self._codec.encode(part, staging, tail_tokens if is_last else None)
                for row, slot in zip(staging, transfer.slots[start:], strict=False):
                    rows[slot].copy_(row, non_blocking=True)
        # Of a tail, the error would be that of what is not kept.
        if blocks and tail_tokens is None and self._stores % _ERROR_SAMPLE_EVERY == 1:
            slot = rows[transfer.slots[0]] if not self._is_cuda else transfer.kept[0][0]
            transfer.relative_error = self._codec.relative_error(blocks[0], slot)

    def _load(self, slots: Sequence[int], blocks: Sequence[int], transfer: _Transfer) -> None:
        rows = self._memory.rows
        if not self._is_cuda:
            for slot, block in zip(slots, blocks, strict=True):
                self._codec.decode(rows[slot : slot + 1], [block])
            return
        for start in range(0, len(slots), STAGING_SLOTS):
            part = slots[start : start + STAGING_SLOTS]
            staging = self._staging(len(part), transfer)
            for row, slot in zip(staging, part, strict=True):
                row.copy_(rows[slot], non_blocking=True)
            self._codec.decode(staging, blocks[start : start + STAGING_SLOTS])

    def _staging(self, rows: int, transfer: _Transfer) -> torch.Tensor:
        shape = (rows, self._layout.slot_bytes)
        staging = torch.empty(shape, dtype=torch.int8, device=self._device)
        transfer.kept.append(staging)  # the copy from or to it is still to come
        return staging

    def _intact_prefix(self, slots: Sequence[int]) -> int:
        for count, slot in enumerate(slots):
            if not self._memory.is_intact(slot):
                metrics.CHECKSUM_FAILURES.inc()
                logger.warning("A KV block in host memory is damaged; it will be recomputed")
                return count
        return len(slots)

    # Time and order.

    def _on_stream(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        stream: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return stream

    def _mark(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _begin(self, job_id: int, blocks: int, *, is_load: bool) -> _Transfer:
        if self._stream is not None:
            # After what the model has written, and before what it writes next (see `wait`). That
            # wait is none of the copy's time.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return _Transfer(job_id, is_load, blocks, began=self._mark(), ended=None)

    def _end(self, transfer: _Transfer) -> None:
        if self._stream is None:
            self._seal(transfer)
        transfer.ended = self._mark()
        self._transfers.append(transfer)

    def _finish(self, transfer: _Transfer) -> TransferResult:
        if self._is_cuda:
            self._seal(transfer)
            seconds = transfer.began.elapsed_time(transfer.ended) / 1000
        else:
            seconds = transfer.ended - transfer.began
        if transfer.relative_error is not None:
            metrics.QUANTIZATION_ERROR.set(float(transfer.relative_error))
        return TransferResult(
            job_id=transfer.job_id,
            success=True,  # damage is found by checksums, block by block
            transfer_size=transfer.blocks * self._layout.slot_bytes,
            transfer_time=seconds,
        )

    def _seal(self, transfer: _Transfer) -> None:
        for slot in transfer.slots:
            if self._codec.is_finite(self._memory.rows[slot]):
                self._memory.seal(slot)
            else:
                self._memory.spoil(slot)

    def _spoil(self, transfer: _Transfer) -> None:
        for slot in transfer.slots:
            self._memory.spoil(slot)
        transfer.slots = ()
