"""Packs bfloat16 KV into slots and back on a CPU, in one compiled pass over each number.

Bit for bit what `quantization` does in torch, which makes seven passes over float32 scratch. LLVM
compiles it for the CPU that it runs on, vectorized, before the first request; nothing is kept on
disk, whose folders may be read-only. It knows nothing of layers, heads or tokens: a block is *runs*
of numbers that are neighbours in memory and in the slot alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from alise_engine.kv_tier.pages import KvPages

_F = TypeVar("_F", bound=Callable[..., Any])

_EXPONENTS = np.uint32((127 - 15) << 10)
"""Between a float32's exponent and a float16's, at the latter's place."""
_INFINITY = np.uint32(0x7C00)  # as a float16
_LEAST_SCALE = np.uint32(0x38800000)  # 2^-14 as a float32
_MAGNITUDE = np.uint16(0x7FFF)
"""All bits of a bfloat16 but its sign."""
_TO_WHOLE = np.float32(1.5 * 2**23)
"""A sum with this is rounded to a whole number, ties to even, which is in its lowest bits."""
_LINE = 32
"""Numbers of 16 bits in a line of the CPU's cache."""


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Each takes memory, starts, an offset to them, the run, and a slot's numbers and scales."""

    pack: Callable[..., None]
    unpack: Callable[..., None]
    error: Callable[..., float]


@dataclass(frozen=True, slots=True)
class CpuBlocks:
    """Blocks of bfloat16 KV in host memory."""

    memory: npt.NDArray[np.uint16]
    """All of it, flat: the bits of the numbers."""
    starts: npt.NDArray[np.int64]
    """Where the runs of block 0 begin, in a slot's order."""
    run: int
    """Numbers in each."""
    step: int
    """From a block to the next."""
    group: int
    """Numbers that share a scale; a run has some whole groups."""

    def pack(self, block: int, slot: torch.Tensor) -> None:
        """Write a block's numbers and scales to `slot`."""
        _compiled(self.group).pack(*self._arguments(block, slot))

    def unpack(self, slot: torch.Tensor, block: int) -> None:
        """Write the numbers of `slot` to a block; its scales must be finite."""
        _compiled(self.group).unpack(*self._arguments(block, slot))

    def relative_error(self, block: int, slot: torch.Tensor) -> float:
        """Return the root mean square error of `slot` over the root mean square of a block."""
        return _compiled(self.group).error(*self._arguments(block, slot))

    def _arguments(self, block: int, slot: torch.Tensor) -> tuple[Any, ...]:
        row, size = slot.numpy(), self.starts.size * self.run
        offset = block * self.step
        return self.memory, self.starts, offset, self.run, row[:size], row[size:].view(np.uint16)


def blocks_of(pages: KvPages, group: int) -> CpuBlocks | None:
    """Return the blocks of `pages`; None where these kernels are not for them.

    They are for bfloat16, with each head's K and V in a slot's order, as vLLM's CPU
    attention has them.
    """
    keys, values = pages.keys, pages.values
    run = keys[0, 0, 0, 0].numel()
    if (
        keys.dtype != torch.bfloat16
        or run % group
        or not all(half[0, 0, 0, 0].is_contiguous() for half in (keys, values))
    ):
        return None
    _compiled(group)
    elements = keys.untyped_storage().nbytes() // keys.element_size()
    memory = keys.as_strided((elements,), (1,), 0).view(torch.uint16).numpy()
    starts = np.stack([_starts(keys), _starts(values)], axis=1).ravel()
    return CpuBlocks(memory, starts, run, keys.stride(1), group)


def one_block(numbers: torch.Tensor, group: int) -> CpuBlocks:
    """Return the block that lies in `numbers`, bfloat16, in a slot's order."""
    memory = numbers.view(-1).view(torch.uint16).numpy()
    return CpuBlocks(memory, np.zeros(1, np.int64), memory.size, 0, group)


def _starts(half: torch.Tensor) -> npt.NDArray[np.int64]:
    """Return where K or V begins in memory, shape (layers, parts, heads)."""
    layer, _, part, head = (
        np.arange(size, dtype=np.int64) * int(stride)
        for size, stride in zip(half.shape[:4], half.stride()[:4], strict=True)
    )
    first: int = half.storage_offset()
    return first + layer[:, None, None] + part[:, None] + head


def _in_kernels(function: _F) -> _F:
    """Let kernels call a function."""
    registered: _F = register_jitable(function)
    return registered


# What follows is compiled. What was calculated is made a `uint32` again, as numba widens whole
# numbers to 64 bits, at half the speed.


@_in_kernels
def _float_of(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@_in_kernels
def _bits_of(number: Any) -> Any:
    return np.float32(number).view(np.uint32)


@_in_kernels
def _of_bfloat16(bits: Any) -> Any:
    return _float_of(np.uint32(bits) << np.uint32(16))


@_in_kernels
def _rounded(bits: Any, dropped: int) -> Any:
    """Return a float's bits without the lowest ones, rounded to the nearest, ties to even."""
    odd = np.uint32(np.uint32(bits >> np.uint32(dropped)) & np.uint32(1))
    below_half = np.uint32((1 << (dropped - 1)) - 1)
    return np.uint32(np.uint32(np.uint32(bits + below_half) + odd) >> np.uint32(dropped))


@_in_kernels
def _scale_for(largest: Any) -> Any:
    """Return the bits of a group's scale; infinite if it is too large for a float16, or NaN."""
    # Floats that are not negative are of one order with their bits, and NaN is the largest.
    bits = max(_bits_of(_of_bfloat16(largest) / np.float32(127.0)), _LEAST_SCALE)
    return np.uint32(min(np.uint32(_rounded(bits, 13) - _EXPONENTS), _INFINITY))


@_in_kernels
def _of_scale(bits: Any) -> Any:
    return _float_of(np.uint32(np.uint32(bits) + _EXPONENTS) << np.uint32(13))


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped to us
def _prefetch(_: Any, memory: Any, place: Any) -> Any:  # noqa: ARG001  # its type is fixed below
    """Have the CPU read the line at `place` ahead of its use.

    Pages of a block are pieces of some KiB far from each other: waiting for the beginning of each
    would take a third of the time.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, number, number, number]),
            "llvm.prefetch.p0",
        )
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
        read, near, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [address, read, near, data])
        return context.get_dummy_value()

    return types.void(memory, types.intp), generate


@cache
def _compiled(group: int) -> _Kernels:
    """Return the kernels for groups of this size, which is a constant in them."""

    def pack(memory: Any, starts: Any, offset: int, run: int, numbers: Any, scales: Any) -> None:
        for place in range(starts.size):
            first = starts[place] + offset
            following = starts[min(place + 1, starts.size - 1)] + offset
            for g in range(run // group):
                for line in range(0, group, _LINE):
                    _prefetch(memory, following + g * group + line)
                x = memory[first + g * group : first + (g + 1) * group]
                q = numbers[place * run + g * group : place * run + (g + 1) * group]
                largest = np.uint16(0)
                for i in range(group):
                    largest = max(largest, np.uint16(x[i] & _MAGNITUDE))
                scale = _scale_for(largest)
                scales[place * run // group + g] = scale
                factor = np.float32(1.0) / _of_scale(scale)
                for i in range(group):
                    q[i] = np.int8(_bits_of(_of_bfloat16(x[i]) * factor + _TO_WHOLE))

    def unpack(memory: Any, starts: Any, offset: int, run: int, numbers: Any, scales: Any) -> None:
        for place in range(starts.size):
            x = memory[starts[place] + offset : starts[place] + offset + run]
            q = numbers[place * run : (place + 1) * run]
            s = scales[place * run // group : (place + 1) * run // group]
            for g in range(run // group):
                scale = _of_scale(s[g])
                for i in range(group):
                    number = np.float32(q[g * group + i]) * scale
                    x[g * group + i] = np.uint16(_rounded(_bits_of(number), 16))

    def error(memory: Any, starts: Any, offset: int, run: int, numbers: Any, scales: Any) -> float:
        squares = errors = 0.0
        for place in range(starts.size):
            x = memory[starts[place] + offset : starts[place] + offset + run]
            q = numbers[place * run : (place + 1) * run]
            s = scales[place * run // group : (place + 1) * run // group]
            for g in range(run // group):
                scale = _of_scale(s[g])
                for i in range(group):
                    exact = _of_bfloat16(x[g * group + i])
                    squares += exact**2
                    errors += (np.float32(q[g * group + i]) * scale - exact) ** 2
        return math.sqrt(errors / max(squares, 1e-30))

    # With these types and no others: a call never compiles anything.
    arguments = (
        *(types.uint16[::1], types.int64[::1], types.int64, types.int64),
        *(types.int8[::1], types.uint16[::1]),
    )
    compiler = {"nogil": True, "error_model": "numpy"}
    return _Kernels(
        pack=njit(types.void(*arguments), **compiler)(pack),
        unpack=njit(types.void(*arguments), **compiler)(unpack),
        error=njit(types.float64(*arguments), fastmath={"reassoc"}, **compiler)(error),
    )
