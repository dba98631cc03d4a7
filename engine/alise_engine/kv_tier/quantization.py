"""Packs blocks of KV into slots and back: symmetric INT8 per group, or the exact bytes.

    scale = max |x| / 127 over the group, in float16;   q = round(x / scale);   x' = q scale

Torch on any device, over all layers of some blocks at a time; compiled loops of the same arithmetic
for bfloat16 and float32 in a CPU's memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from alise_engine.kv_tier.layout import Quantization, SlotLayout

_MAX_INT8 = 127.0
_LEAST_SCALE = 2.0**-14
"""The smallest normal float16; a group of smaller numbers is stored as zeros or ones of it."""


class BlockCodec:
    """Encodes and decodes up to `rows` blocks of `pages` at a time.

    Args:
        layout: of a slot.
        rows: blocks at a time; one is best on a CPU, whose cache it fits, some on a GPU.
        pages: the KV cache, shape (layers, blocks, page elements).

    """

    def __init__(self, layout: SlotLayout, rows: int, pages: torch.Tensor) -> None:
        self._layout = layout
        self._pages = pages
        self._is_int8 = layout.quantization == Quantization.INT8
        if self._is_int8:
            groups = layout.block_elements // layout.group
            shape = (rows, groups, layout.group)
            self._values = torch.empty(shape, dtype=torch.float32, device=pages.device)
            self._scales = self._values.new_empty(rows, groups, 1)

    def encode(self, blocks: Sequence[int], slots: torch.Tensor) -> None:
        """Pack `blocks` into `slots`, shape (blocks, slot bytes), int8."""
        rows = len(blocks)
        if not self._is_int8:
            for row, block in enumerate(blocks):
                self._exact(slots[row]).copy_(self._pages[:, block])
            return
        values, scales = self._values[:rows], self._scales[:rows]
        for row, block in enumerate(blocks):
            self._by_page(values[row]).copy_(self._pages[:, block])
        torch.amax(values.abs(), -1, keepdim=True, out=scales)
        scales.div_(_MAX_INT8).clamp_(min=_LEAST_SCALE)
        packed = self._packed_scales(slots)
        packed.copy_(scales.squeeze(-1))
        # Divided by the scale as it is stored, so that rounding it adds no error.
        scales.squeeze(-1).copy_(packed)
        values.mul_(scales.reciprocal_()).round_()
        slots[:, : self._layout.data_bytes].copy_(values.view(rows, -1))

    def decode(self, slots: torch.Tensor, blocks: Sequence[int]) -> None:
        """Unpack `slots` into `blocks`."""
        if not self._is_int8:
            for row, block in enumerate(blocks):
                self._pages[:, block].copy_(self._exact(slots[row]))
            return
        values = self._dequantized(slots)
        for row, block in enumerate(blocks):
            self._pages[:, block].copy_(self._by_page(values[row]))

    def relative_error(self, block: int, slot: torch.Tensor) -> torch.Tensor:
        """Return the root mean square error of `slot` over the root mean square of `block`."""
        if not self._is_int8:
            return torch.zeros(())
        exact = self._pages[:, block].float()
        error = self._by_page(self._dequantized(slot[None])[0]) - exact
        return error.square().mean().sqrt() / exact.square().mean().sqrt().clamp_(min=1e-30)

    def is_finite(self, slot: torch.Tensor) -> bool:
        """Say whether a packed slot holds numbers: an overflow makes a scale infinite or NaN."""
        if not self._is_int8:
            return True
        # Scales are positive: their sum is finite if all are.
        return math.isfinite(float(self._packed_scales(slot[None]).float().sum()))

    def _dequantized(self, slots: torch.Tensor) -> torch.Tensor:
        rows = len(slots)
        values, scales = self._values[:rows], self._scales[:rows]
        values.view(rows, -1).copy_(slots[:, : self._layout.data_bytes])
        scales.squeeze(-1).copy_(self._packed_scales(slots))
        return values.mul_(scales)

    def _by_page(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(self._layout.layers, self._layout.page_elements)

    def _packed_scales(self, slots: torch.Tensor) -> torch.Tensor:
        return slots[:, self._layout.data_bytes :].view(torch.float16)

    def _exact(self, slot: torch.Tensor) -> torch.Tensor:
        return self._by_page(slot.view(self._pages.dtype))


class CpuBlockCodec(BlockCodec):
    """The same for bfloat16 and float32 in a CPU's memory, compiled: several times as fast."""

    def __init__(self, layout: SlotLayout, pages: torch.Tensor) -> None:
        super().__init__(layout, 1, pages)
        # Compiled when first called, which takes seconds: at start, not in a step.
        from alise_engine.kv_tier import cpu_kernels

        self._kernels = cpu_kernels
        is_short = pages.dtype == torch.bfloat16
        self._shift = np.uint32(16 if is_short else 0)
        signed, unsigned = (torch.int16, np.uint16) if is_short else (torch.int32, np.uint32)
        self._bits = pages.view(signed).numpy().view(unsigned)
        self._page_scales = self._scales.view(layout.layers, -1)
        kept = pages[:, :1].clone()
        slot = torch.zeros(1, layout.slot_bytes, dtype=torch.int8)
        self.encode([0], slot)
        self.decode(slot, [0])
        pages[:, :1] = kept

    def encode(self, blocks: Sequence[int], slots: torch.Tensor) -> None:
        """Pack one block into one slot."""
        (block,), (slot,) = blocks, slots
        self._kernels.encode(
            self._bits[:, block],
            self._shift,
            self._layout.group,
            np.float32(_LEAST_SCALE),
            self._by_page(slot[: self._layout.data_bytes]).numpy(),
            self._page_scales.numpy(),
        )
        self._packed_scales(slots).copy_(self._scales.view(1, -1))

    def decode(self, slots: torch.Tensor, blocks: Sequence[int]) -> None:
        """Unpack one slot into one block."""
        (block,), (slot,) = blocks, slots
        self._scales.view(1, -1).copy_(self._packed_scales(slots))
        self._kernels.decode(
            self._by_page(slot[: self._layout.data_bytes]).numpy(),
            self._page_scales.numpy(),
            self._shift,
            self._layout.group,
            self._bits[:, block],
        )


def make_codec(layout: SlotLayout, rows: int, pages: torch.Tensor) -> BlockCodec:
    """Return the codec for `pages` that suits their device; `rows` is of interest to a GPU."""
    if pages.device.type != "cpu":
        return BlockCodec(layout, rows, pages)
    is_compiled = pages.dtype in (torch.bfloat16, torch.float32)
    if is_compiled and layout.quantization == Quantization.INT8:
        return CpuBlockCodec(layout, pages)
    return BlockCodec(layout, 1, pages)
