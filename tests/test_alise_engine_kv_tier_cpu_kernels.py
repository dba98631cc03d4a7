"""The compiled kernels against the torch path that they stand in for: the same bits."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from alise_engine.kv_tier import cpu_kernels
from alise_engine.kv_tier.layout import Quantization, SlotLayout
from alise_engine.kv_tier.pages import KvPages, cpu_pages, gpu_pages, stacked
from alise_engine.kv_tier.quantization import BlockCodec
from hypothesis import given
from hypothesis import strategies as st

LAYERS, BLOCKS, HEADS, TOKENS = 2, 4, 2, 32
SIZES = [16, 64, 80]
INFINITY = 0x7F80


def memory_of(bits: np.ndarray, size: int) -> torch.Tensor:
    """Return a KV cache of these bits, which are repeated; not at the start of its allocation."""
    shape = (LAYERS, BLOCKS, HEADS, TOKENS, 2 * size)
    repeated = np.resize(bits.astype(np.uint16), 64 + int(np.prod(shape)))
    return torch.from_numpy(repeated).view(torch.bfloat16)[64:].view(shape)


def codecs(memory: torch.Tensor, block_tokens: int = TOKENS) -> tuple[BlockCodec, BlockCodec]:
    """Return a codec with kernels and one without, of the same pages."""
    size = memory.shape[-1] // 2
    pages = cpu_pages(stacked(list(memory), block_tokens), size)
    layout = SlotLayout(LAYERS, HEADS * block_tokens * 2 * size, 2, size, Quantization.INT8)
    fast = BlockCodec(layout, 1, pages)
    with mock.patch.object(cpu_kernels, "blocks_of", return_value=None):
        plain = BlockCodec(layout, 1, pages)
    assert fast._compiled is not None
    assert plain._compiled is None
    return fast, plain


def bits_of(memory: torch.Tensor) -> torch.Tensor:
    return memory.clone().view(torch.int16)


def assert_alike(
    memory: torch.Tensor, tail_tokens: int | None = None, block_tokens: int = TOKENS
) -> None:
    """Store block 1 and load it as block 0, both ways."""
    stored, restored = [], []
    exact = memory.clone()
    for codec in codecs(memory, block_tokens):
        memory.copy_(exact)
        slot = torch.full((1, codec._layout.slot_bytes), 7, dtype=torch.int8)
        codec.encode([1], slot, tail_tokens)
        assert torch.equal(bits_of(memory), bits_of(exact))
        stored.append((codec.is_finite(slot[0]), slot))
        if codec.is_finite(slot[0]):
            codec.decode(slot, [0])
        restored.append(bits_of(memory))
    (fast, fast_slot), (plain, plain_slot) = stored
    assert fast == plain
    assert not fast or torch.equal(fast_slot, plain_slot)
    assert torch.equal(*restored)
    parts = block_tokens // TOKENS
    assert torch.equal(restored[0][:, parts:], bits_of(exact)[:, parts:]), "others are left alone"


def finite_bits(most: int) -> st.SearchStrategy[int]:
    """Return bits of bfloat16 of either sign, zeros and subnormals among them."""
    return st.builds(lambda bits, sign: bits | sign << 15, st.integers(0, most), st.booleans())


@pytest.mark.parametrize("size", SIZES)
@given(
    bits=st.lists(finite_bits(0x4900), min_size=1, max_size=400),
    tail_tokens=st.none() | st.integers(1, TOKENS),
)
def test_slots_and_what_is_restored_have_the_same_bits(
    size: int, bits: list[int], tail_tokens: int | None
) -> None:
    assert_alike(memory_of(np.array(bits), size), tail_tokens)


@given(bits=st.lists(finite_bits(0x7FFF), min_size=1, max_size=2000))
def test_numbers_of_any_size_are_stored_alike_or_a_miss_in_both(bits: list[int]) -> None:
    assert_alike(memory_of(np.array(bits), 64))


@pytest.mark.parametrize("scale", [1e-38, 1e-6, 2.0**-14, 1.0, 1000.0])
def test_random_numbers(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(100_003, generator=generator) * scale
    bits = numbers.to(torch.bfloat16).view(torch.uint16).numpy()
    assert_alike(memory_of(bits, 64))


def test_every_number_is_restored_alike_at_many_scales() -> None:
    # All 127 and more steps of a group, ties between them, and as many scales.
    largest = np.arange(0x3000, 0x4A00, dtype=np.uint16)
    for shift in (0, 1, 7, 64, 130, 200):
        assert_alike(memory_of(np.stack([largest, largest - shift], -1).ravel(), 64))


@pytest.mark.parametrize("bits", [INFINITY, INFINITY | 0x8000, 0x7FC0, 0xFFC0, 0x7F81, 0x7F00])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 1, 31, 127), (1, 0, 3, 70)])
def test_one_number_that_a_scale_cannot_hold_is_seen(
    bits: int, place: tuple[int, int, int, int]
) -> None:
    memory = memory_of(np.array([0x3F80]), 64)
    layer, head, token, channel = place
    memory.view(torch.uint16)[layer, 1, head, token, channel] = bits
    fast, _ = codecs(memory)
    slot = torch.empty(1, fast._layout.slot_bytes, dtype=torch.int8)
    fast.encode([1], slot)
    assert not fast.is_finite(slot[0])
    fast.encode([2], slot)
    assert fast.is_finite(slot[0])


def test_a_block_of_several_kernel_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randn(50_001, generator=generator).to(torch.bfloat16).view(torch.uint16).numpy()
    for tail_tokens in (None, 20, TOKENS, 50):
        assert_alike(memory_of(bits, 64), tail_tokens, block_tokens=2 * TOKENS)


def test_the_error_that_is_reported_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randn(50_001, generator=generator).to(torch.bfloat16).view(torch.uint16).numpy()
    fast, plain = codecs(memory_of(bits, 64))
    slot = torch.empty(1, fast._layout.slot_bytes, dtype=torch.int8)
    fast.encode([1], slot)
    error = float(fast.relative_error(1, slot[0]))
    assert 0.003 < error < 0.01
    assert error == pytest.approx(float(plain.relative_error(1, slot[0])), rel=1e-4)


def gpu_like(dtype: torch.dtype) -> KvPages:
    cache = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * 64, dtype=dtype)
    return gpu_pages(stacked([cache], TOKENS), 64)


def cpu_like(dtype: torch.dtype) -> KvPages:
    cache = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * 64, dtype=dtype)
    return cpu_pages(stacked([cache], TOKENS), 64)


@pytest.mark.parametrize(
    "pages",
    [cpu_like(torch.float32), cpu_like(torch.float16), gpu_like(torch.bfloat16)],
    ids=["float32", "float16", "K not by channels"],
)
def test_other_pages_are_left_to_torch(pages: KvPages) -> None:
    assert cpu_kernels.blocks_of(pages, 64) is None


def test_no_call_compiles() -> None:
    codecs(memory_of(np.array([0x3F80]), 64))
    kernels = cpu_kernels._compiled(64)
    for kernel in (kernels.pack, kernels.unpack, kernels.error):
        with pytest.raises(TypeError, match="No matching definition"):
            kernel(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)


def test_plugins_do_not_import_numba() -> None:
    program = "import sys, alise_engine.scheduler; print('llvmlite' in sys.modules)"
    # Before a worker has started it makes vLLM's CPU platform fail.
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip().endswith("False")
