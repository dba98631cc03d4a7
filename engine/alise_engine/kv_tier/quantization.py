"""Packs blocks of KV into slots and back: symmetric INT8 per group, or the exact bytes.

    scale = max |x| / 127 over the group, in float16;   q = round(x / scale);   x' = q scale

Device-neutral torch over all layers of some blocks at a time, in scratch memory that is made once:
fresh memory for every step of it would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alise_engine.kv_tier.layout import Quantization, SlotLayout

_MAX_INT8 = 127.0
_LEAST_SCALE = 2.0**-14
"""The smallest normal float16; a group of smaller numbers is stored as zeros or ones of it."""
_HALF_EXPONENT = 0x7C00
"""All these bits are set in a float16 that is infinite or NaN."""


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
            self._magnitudes = torch.empty_like(self._values)
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
        torch.abs(values, out=self._magnitudes[:rows])
        torch.amax(self._magnitudes[:rows], -1, keepdim=True, out=scales)
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
        """Say whether a slot in host memory holds numbers: else a scale is infinite or NaN."""
        if not self._is_int8:
            return True
        bits = self._packed_scales(slot[None]).view(torch.int16).numpy()
        return not bool(((bits & _HALF_EXPONENT) == _HALF_EXPONENT).any())

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
