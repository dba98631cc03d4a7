"""The codec for KV in a CPU's memory: compiled, one thread, one pass over a block.

The same arithmetic as the torch code, which goes over the memory once for each operation.
For bfloat16 and float32; the KV cache is seen as their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""bfloat16 or float32, as their bits."""

_SIGN_OFF = np.uint32(0x7FFFFFFF)
_TO_INTEGER = np.float32(12_582_912.0)
"""1.5 x 2^23: a float32 that this is added to, and taken off again, is rounded to even."""
_HALF_BITS = 13
"""float16 has so many bits of fraction less than float32, bfloat16 16."""


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped to us
def _as_float(_: Any, bits: Any) -> Any:  # noqa: ARG001 # read by its name
    """Return the float32 that has these bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(_: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the bits of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(nogil=True)  # type: ignore[untyped-decorator]
def encode(
    pages: Bits,
    shift: np.uint32,
    group: int,
    least_scale: np.float32,
    data: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
) -> None:
    """Quantize one block.

    Args:
        pages: shape (layers, page elements).
        shift: how far left the bits of an element are from those of float32: 16 or 0.
        group: elements that share a scale.
        least_scale: a smaller scale becomes this.
        data: to write, shape (layers, page elements).
        scales: to write, shape (layers, groups of a page); exact in float16 unless they are
            infinite there, or NaN.

    """
    for layer in range(pages.shape[0]):
        for place in range(scales.shape[1]):
            start = place * group
            largest = np.uint32(0)
            for column in range(start, start + group):
                bits = (np.uint32(pages[layer, column]) << shift) & _SIGN_OFF
                largest = max(largest, bits)
            scale = max(_as_float(largest) / np.float32(127.0), least_scale)
            if largest > np.uint32(0x7F800000):  # NaN
                scale = _as_float(largest)
            rounding = np.uint32((1 << (_HALF_BITS - 1)) - 1)
            kept = _as_bits(scale)
            kept += rounding + ((kept >> np.uint32(_HALF_BITS)) & np.uint32(1))
            scale = _as_float((kept >> np.uint32(_HALF_BITS)) << np.uint32(_HALF_BITS))
            scales[layer, place] = scale
            inverse = np.float32(1.0) / scale
            for column in range(start, start + group):
                value = _as_float(np.uint32(pages[layer, column]) << shift)
                data[layer, column] = np.int8((value * inverse + _TO_INTEGER) - _TO_INTEGER)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def decode(
    data: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    shift: np.uint32,
    group: int,
    pages: Bits,
) -> None:
    """Write one block back; shapes as in `encode`, values rounded to the pages' type."""
    rounding = np.uint32((1 << 15) - 1) if shift else np.uint32(0)
    for layer in range(pages.shape[0]):
        for place in range(scales.shape[1]):
            scale = scales[layer, place]
            start = place * group
            for column in range(start, start + group):
                bits = _as_bits(np.float32(data[layer, column]) * scale)
                if shift:
                    bits += rounding + ((bits >> np.uint32(16)) & np.uint32(1))
                pages[layer, column] = bits >> shift
