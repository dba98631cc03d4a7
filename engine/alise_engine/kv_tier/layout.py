"""How one block of KV lies in a slot of host memory, and how many slots fit into a bound.

Pure arithmetic. A slot holds one block of all layers of one worker:

    | layer 0: K, V | layer 1: K, V | ... | their scales |

With INT8, K lies by head, channel and token, V by head, token and channel, whatever the attention
backend's order is, and each *group* of `group` neighbours there has one float16 scale. Without, a
slot holds the exact bytes in the backend's own order and there are no scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

SCALE_BYTES = 2  # float16
CHECKSUM_BYTES = 8
INDEX_BYTES = 320
"""What the scheduler remembers of a slot (Python objects), measured and rounded up."""


class Quantization(str, Enum):
    """How KV is kept in the host tier."""

    INT8 = "int8"
    NONE = "none"


class TierTooSmallError(ValueError):
    """The bound on host memory leaves no room for a single block."""


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The layout of one slot."""

    layers: int
    page_elements: int
    """Elements of one layer in one block."""
    element_bytes: int
    """Of the device's KV cache."""
    group: int
    """Elements that share a scale."""
    quantization: Quantization

    @property
    def block_elements(self) -> int:
        """Return the elements of a block in all layers."""
        return self.layers * self.page_elements

    @property
    def data_bytes(self) -> int:
        """Return the bytes of a block's elements in the slot; its scales follow."""
        is_quantized = self.quantization == Quantization.INT8
        return self.block_elements * (1 if is_quantized else self.element_bytes)

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of a slot."""
        if self.quantization == Quantization.NONE:
            return self.data_bytes
        return self.data_bytes + self.block_elements // self.group * SCALE_BYTES

    @property
    def bytes_per_slot(self) -> int:
        """Return what a slot costs in all: data, scales, checksum and its place in the index."""
        return self.slot_bytes + CHECKSUM_BYTES + INDEX_BYTES


def slots_within(host_bytes: int, workers: int, layout: SlotLayout, staging_slots: int) -> int:
    """Return how many slots each worker may have.

    `host_bytes` bounds all workers together, with `staging_slots` of scratch each; raises
    `TierTooSmallError`.
    """
    slots = host_bytes // workers // layout.bytes_per_slot - staging_slots
    if slots < 1:
        least_mib = (staging_slots + 1) * layout.bytes_per_slot * workers / 2**20
        raise TierTooSmallError(
            f"--alise-kv-host-gib: {host_bytes / 2**20:.0f} MiB hold no KV block of this model; "
            f"it takes {least_mib:.0f} MiB at least, or 0 to serve without the tier"
        )
    return slots
