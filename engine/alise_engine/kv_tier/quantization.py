"""Packs blocks of KV into slots and back: symmetric INT8 per group, or the exact bytes.

    scale = max |x| / 127 over the group, in float16;   q = round(x / scale);   x' = q scale

A group of K is of some channels of a block's tokens, as K's large numbers stay in their channels; a
group of V is one token's (KIVI, Liu et al., ICML 2024, arXiv 2402.02750). Device-neutral torch over
all layers of some blocks at a time, in scratch memory that is made once: fresh memory for every
step of it would cost more than the arithmetic. For bfloat16 on a CPU, `cpu_kernels` do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from alise_engine.kv_tier.layout import Quantization, SlotLayout
from alise_engine.kv_tier.pages import KvPages

if TYPE_CHECKING:
    from alise_engine.kv_tier.cpu_kernels import CpuBlocks

_MAX_INT8 = 127.0
_LEAST_SCALE = 2.0**-14
"""The smallest normal float16; a group of smaller numbers is stored as zeros or ones of it."""
_INFINITE_SCALE = 0x7C00
"""As a float16. No scale is negative, so that others are less, and NaN more."""


class BlockCodec:
    """Encodes and decodes up to `rows` blocks of `pages` at a time.

    Args:
        layout: of a slot.
        rows: blocks at a time; one is best on a CPU, whose cache it fits, some on a GPU.
        pages: the KV cache.

    Raises:
        ValueError: the pages are of another size than the layout's.

    """

    def __init__(self, layout: SlotLayout, rows: int, pages: KvPages) -> None:
        if pages.whole[:, 0].numel() != layout.block_elements:
            raise ValueError(
                f"A block of the KV cache has {pages.whole[:, 0].numel()} elements, not the "
                f"{layout.block_elements} that vLLM announced; serve with --alise-kv-host-gib 0"
            )
        self._layout = layout
        self._pages = pages
        self._is_int8 = layout.quantization == Quantization.INT8
        if not self._is_int8:
            return
        device = pages.whole.device
        shape = (rows, layout.block_elements // layout.group, layout.group)
        self._compiled: CpuBlocks | None = None
        if device.type == "cpu":
            # Not before a worker has started: vLLM's looks through all that is imported by then,
            # and fails at a module of llvmlite, which numba brings.
            from alise_engine.kv_tier import cpu_kernels

            self._compiled = cpu_kernels.blocks_of(pages, layout.group)
        if self._compiled is not None:
            self._values = torch.empty((1, *shape[1:]), dtype=torch.bfloat16)
            """The last block of a job, without what lies behind its tail."""
            self._compiled_tail = cpu_kernels.one_block(self._values, layout.group)
            return
        self._values = torch.empty(shape, dtype=torch.float32, device=device)
        self._magnitudes = torch.empty_like(self._values)
        self._scales = self._values.new_empty(*shape[:2], 1)

    def encode(
        self, blocks: Sequence[int], slots: torch.Tensor, tail_tokens: int | None = None
    ) -> None:
        """Pack `blocks` into `slots`, shape (blocks, slot bytes), int8.

        The last block has only `tail_tokens` tokens, if given; what lies behind them is somebody's
        old KV, and must not widen the scale of these.
        """
        rows = len(blocks)
        if not self._is_int8:
            for row, block in enumerate(blocks):
                self._exact(slots[row]).copy_(self._pages.whole[:, block])
            return
        if self._compiled is not None:
            full = rows if tail_tokens is None else rows - 1
            for row in range(full):
                self._compiled.pack(blocks[row], slots[row])
            if tail_tokens is not None:
                self._gather(blocks[full:], tail_tokens)
                self._compiled_tail.pack(0, slots[full])
            return
        self._gather(blocks, tail_tokens)
        values, scales = self._values[:rows], self._scales[:rows]
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
                self._pages.whole[:, block].copy_(self._exact(slots[row]))
            return
        if self._compiled is not None:
            for row, block in enumerate(blocks):
                self._compiled.unpack(slots[row], block)
            return
        values = self._dequantized(slots)
        for row, block in enumerate(blocks):
            keys, block_values = self._halves(values[row])
            self._pages.keys[:, block].copy_(keys)
            self._pages.values[:, block].copy_(block_values)

    def relative_error(self, block: int, slot: torch.Tensor) -> torch.Tensor:
        """Return the root mean square error of `slot` over the root mean square of `block`."""
        if not self._is_int8:
            return torch.zeros(())
        if self._compiled is not None:
            return torch.tensor(self._compiled.relative_error(block, slot))
        halves = self._halves(self._dequantized(slot[None])[0])
        error = square = torch.zeros((), device=slot.device)
        for kept, pages in zip(halves, (self._pages.keys, self._pages.values), strict=True):
            exact = pages[:, block].float()
            error = error + (kept - exact).square().sum()
            square = square + exact.square().sum()
        return (error / square.clamp_(min=1e-30)).sqrt()

    def is_finite(self, slot: torch.Tensor) -> bool:
        """Say whether a slot in host memory holds numbers: else a scale is infinite or NaN."""
        if not self._is_int8:
            return True
        bits = slot.numpy()[self._layout.data_bytes :].view(np.uint16)
        return int(bits.max()) < _INFINITE_SCALE

    def _gather(self, blocks: Sequence[int], tail_tokens: int | None) -> None:
        """Copy blocks to the scratch, in a slot's order; see `encode`."""
        for row, block in enumerate(blocks):
            keys, values = self._halves(self._values[row])
            keys.copy_(self._pages.keys[:, block])
            values.copy_(self._pages.values[:, block])
        if tail_tokens is not None:
            self._blank(self._values[len(blocks) - 1], tail_tokens)

    def _dequantized(self, slots: torch.Tensor) -> torch.Tensor:
        rows = len(slots)
        values, scales = self._values[:rows], self._scales[:rows]
        values.view(rows, -1).copy_(slots[:, : self._layout.data_bytes])
        scales.squeeze(-1).copy_(self._packed_scales(slots))
        return values.mul_(scales)

    def _halves(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of one block's scratch in the shapes of `KvPages` without the blocks."""
        by_layer = values.view(self._layout.layers, 2, -1)
        keys, block_values = self._pages.keys[0, 0], self._pages.values[0, 0]
        return (
            by_layer[:, 0].unflatten(-1, keys.shape),
            by_layer[:, 1].unflatten(-1, block_values.shape),
        )

    def _blank(self, values: torch.Tensor, tokens: int) -> None:
        """Zero the places of one block's scratch that are behind its first `tokens` tokens."""
        if not self._pages.are_tokens_known:
            return
        keys, block_values = self._halves(values)
        part_tokens = keys.shape[-1]
        for part in range(keys.shape[1]):
            first = min(max(tokens - part * part_tokens, 0), part_tokens)
            keys[:, part, ..., first:] = 0.0
            block_values[:, part, :, first:] = 0.0

    def _packed_scales(self, slots: torch.Tensor) -> torch.Tensor:
        return slots[:, self._layout.data_bytes :].view(torch.float16)

    def _exact(self, slot: torch.Tensor) -> torch.Tensor:
        whole = self._pages.whole
        return slot.view(whole.dtype).view(whole[:, 0].shape)
