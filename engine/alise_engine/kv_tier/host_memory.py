"""The host tier's memory: slots of bytes, each with a checksum that is verified before it is read.

Bounded: it is allocated once, pinned where a GPU copies from it. It does not know what the bytes
mean.
"""

from __future__ import annotations

import torch
import xxhash
from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor


class HostMemory:
    """`slots` rows of `slot_bytes` bytes."""

    def __init__(self, slots: int, slot_bytes: int, *, is_pinned: bool) -> None:
        self.rows = torch.empty(slots, slot_bytes, dtype=torch.int8)
        """Shape (slots, slot_bytes), int8."""
        if is_pinned:
            # torch's `pin_memory` would round up to a power of two, up to twice the bound.
            pin_tensor(self.rows)
        self._bytes = self.rows.numpy()
        self._checksums: list[int | None] = [None] * slots

    def seal(self, slot: int) -> None:
        """Note the checksum of what has been written to a slot."""
        self._checksums[slot] = self._digest(slot)

    def spoil(self, slot: int) -> None:
        """Mark a slot whose content can't be used."""
        self._checksums[slot] = None

    def is_intact(self, slot: int) -> bool:
        """Say whether a slot still holds what it was sealed with."""
        return self._checksums[slot] is not None and self._checksums[slot] == self._digest(slot)

    def _digest(self, slot: int) -> int:
        digest: int = xxhash.xxh3_64_intdigest(self._bytes[slot])
        return digest
