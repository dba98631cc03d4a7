"""How fast the KV tier stores and loads, against a plain copy of the same bytes. No engine.

One thread, blocks at random places of a KV cache larger than the CPU's caches, the three ways in
turns; medians over rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
import torch
from alise_engine.kv_tier.layout import Quantization, SlotLayout
from alise_engine.kv_tier.manager import HostSlots
from alise_engine.kv_tier.pages import cpu_pages, stacked
from alise_engine.kv_tier.worker import TierWorker
from vllm.v1.kv_offload.base import GPULoadStoreSpec

_CACHE_BYTES: Final = 512 << 20
_JOB_TOKENS: Final = 512
_ROUNDS: Final = 40


@dataclass(frozen=True, slots=True)
class KvShape:
    """A model's KV cache."""

    layers: int
    kv_heads: int
    head_size: int

    @property
    def token_elements(self) -> int:
        """Return the elements of one token's KV."""
        return self.layers * self.kv_heads * 2 * self.head_size


@dataclass(frozen=True, slots=True)
class CopySpeed:
    """One way of keeping KV in host memory; seconds are of one job of 512 tokens."""

    quantization: Quantization
    bytes_per_token: float
    bfloat16_bytes_per_token: int
    plain_copy_s: float
    """Copying the job's bfloat16 bytes."""
    store_s: float
    load_s: float


def measure_copies(shape: KvShape, quantization: Quantization, block_tokens: int) -> CopySpeed:
    """Time stores and loads of bfloat16 KV, and plain copies of its bytes, in turns."""
    torch.set_num_threads(1)
    page = (shape.kv_heads, block_tokens, 2 * shape.head_size)
    layout = SlotLayout(shape.layers, math.prod(page), 2, shape.head_size, quantization)
    block_bytes = layout.block_elements * 2
    blocks = _CACHE_BYTES // block_bytes
    caches = list(torch.randn(shape.layers, blocks, *page).to(torch.bfloat16))
    pages = cpu_pages(stacked(caches, block_tokens), shape.head_size)
    worker = TierWorker(pages, layout, slots=blocks)
    worker._memory.rows.zero_()  # the system hands memory over when it is first written
    count = _JOB_TOKENS // block_tokens
    plain = torch.zeros(blocks // count, count * block_bytes, dtype=torch.int8)
    copies = torch.zeros_like(plain)
    generator = np.random.default_rng(0)
    times: dict[str, list[float]] = {"plain": [], "store": [], "load": []}
    for _ in range(_ROUNDS):
        source = generator.choice(blocks, count, replace=False).tolist()
        slots = HostSlots(generator.choice(blocks, count, replace=False).tolist())
        device = GPULoadStoreSpec(source, group_sizes=[count], block_indices=[0])
        place = int(generator.integers(len(plain)))
        times["plain"].append(_seconds(copies[place].copy_, plain[place]))
        times["store"].append(_seconds(worker.submit_store, 0, device, slots))
        times["load"].append(_seconds(worker.submit_load, 1, slots, device))
        worker.get_finished()
    return CopySpeed(
        quantization=quantization,
        bytes_per_token=layout.bytes_per_slot / block_tokens,
        bfloat16_bytes_per_token=shape.token_elements * 2,
        plain_copy_s=median(times["plain"]),
        store_s=median(times["store"]),
        load_s=median(times["load"]),
    )


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    began_s = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began_s
