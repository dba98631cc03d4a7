"""K and V in vLLM's own layouts of the KV cache: each group has one kind, and no unused rows."""

from __future__ import annotations

import pytest
import torch
from alise_engine.kv_tier.layout import Quantization, SlotLayout
from alise_engine.kv_tier.pages import KvPages, cpu_pages, gpu_pages, stacked
from alise_engine.kv_tier.quantization import BlockCodec
from vllm import _custom_ops as ops
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)

LAYERS, BLOCKS, TOKENS, HEADS, SIZE = 3, 6, 32, 2, 64
OUTLIER = 1000.0
"""As K has them: always in the same channel."""


def caches_of(layout: KVCacheLayout, kernel_tokens: int = TOKENS) -> list[torch.Tensor]:
    """Return empty KV tensors, made by vLLM."""
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32
    )
    strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    size = LAYERS * BLOCKS * spec.page_size_bytes
    tensor = KVCacheTensor(
        size=size,
        layers=[f"layer {i}" for i in range(LAYERS)],
        layer_stride=strides[0],
        block_stride=strides[1],
    )
    raw = torch.zeros(size, dtype=torch.int8)
    return create_kv_cache_views(raw, spec, BLOCKS, layout, tensor, kernel_tokens)


def random_kv() -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of a block, shape (layers, heads, tokens, channels)."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, LAYERS, HEADS, TOKENS, SIZE, generator=generator)
    keys[..., 7] *= OUTLIER
    values[:, :, 5] *= OUTLIER
    return keys, values


def write(caches: list[torch.Tensor], block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write as GPUs' attention backends do: in logical places, by kernel blocks."""
    content = torch.cat([keys, values], -1)
    parts = TOKENS // caches[0].shape[2]
    for cache, of_layer in zip(caches, content, strict=True):
        for part, piece in enumerate(of_layer.chunk(parts, dim=1)):
            cache[block * parts + part] = piece


def read(caches: list[torch.Tensor], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = TOKENS // caches[0].shape[2]
    pieces = [torch.stack([c[block * parts + part] for c in caches]) for part in range(parts)]
    keys, values = torch.cat(pieces, dim=2).split(SIZE, -1)
    return keys, values


def round_trip(pages: KvPages, quantization: Quantization, tail_tokens: int | None = None) -> None:
    """Store block 1 and load it as block 4."""
    element_bytes = pages.whole.element_size()
    layout = SlotLayout(LAYERS, HEADS * TOKENS * 2 * SIZE, element_bytes, SIZE, quantization)
    codec = BlockCodec(layout, 1, pages)
    slot = torch.empty(1, layout.slot_bytes, dtype=torch.int8)
    codec.encode([1], slot, tail_tokens)
    assert codec.is_finite(slot[0])
    codec.decode(slot, [4])


def assert_near(
    found: tuple[torch.Tensor, torch.Tensor], true: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Half a step of the group at most: K's outliers spoil their neighbours, V's their token."""
    key_error, value_error = ((f - t).abs() for f, t in zip(found, true, strict=True))
    near = list(range(6, 8))  # a group of 64 has 2 channels of 32 tokens
    far = [channel for channel in range(SIZE) if channel not in near]
    assert float(key_error[..., far].max()) < 0.03
    assert float(key_error[..., near].max()) < 0.03 * OUTLIER
    others = [token for token in range(value_error.shape[2]) if token != 5]
    assert float(value_error[:, :, others].max()) < 0.03


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
def test_k_is_grouped_by_channels_in_all_of_vllms_layouts(layout: KVCacheLayout) -> None:
    caches = caches_of(layout)
    true = random_kv()
    write(caches, 1, *true)
    round_trip(gpu_pages(stacked(caches, TOKENS), SIZE), Quantization.INT8)
    assert_near(read(caches, 4), true)
    untouched = [block for block in range(BLOCKS) if block not in (1, 4)]
    assert all(not cache[block].any() for cache in caches for block in untouched)


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
def test_exact_bytes_return_in_all_of_vllms_layouts(layout: KVCacheLayout) -> None:
    caches = caches_of(layout)
    true = random_kv()
    write(caches, 1, *true)
    round_trip(gpu_pages(stacked(caches, TOKENS), SIZE), Quantization.NONE)
    for found, expected in zip(read(caches, 4), true, strict=True):
        assert torch.equal(found, expected)


def test_a_block_of_several_kernel_blocks() -> None:
    caches = caches_of(KVCacheLayout.LBHNC, kernel_tokens=16)
    assert caches[0].shape[0] == 2 * BLOCKS
    keys, values = random_kv()
    write(caches, 1, keys, values)
    keys_of_20, values_of_20 = keys[:, :, :20], values[:, :, :20]
    round_trip(gpu_pages(stacked(caches, TOKENS), SIZE), Quantization.INT8, tail_tokens=20)
    found_keys, found_values = read(caches, 4)
    # A group of 64 has 4 channels of 16 tokens here.
    assert float((found_keys[:, :, :20] - keys_of_20).abs()[..., 8:].max()) < 0.03
    assert float((found_values[:, :, 6:20] - values_of_20[:, :, 6:]).abs().max()) < 0.03
    assert not found_keys[:, :, 20:].any()


@pytest.mark.parametrize("tail_tokens", [1, 6, 31])
@pytest.mark.parametrize("old", [1e9, float("inf"), float("nan")])
def test_old_values_in_unused_rows_do_not_spoil_a_tail(old: float, tail_tokens: int) -> None:
    caches = caches_of(KVCacheLayout.LBNHC)
    keys, values = random_kv()
    keys[:, :, tail_tokens:] = old
    values[:, :, tail_tokens:] = old
    write(caches, 1, keys, values)
    round_trip(gpu_pages(stacked(caches, TOKENS), SIZE), Quantization.INT8, tail_tokens)
    found = tuple(half[:, :, :tail_tokens] for half in read(caches, 4))
    assert_near(found, (keys[:, :, :tail_tokens], values[:, :, :tail_tokens]))


@pytest.mark.parametrize("tail_tokens", [None, 9])
def test_the_layout_of_vllms_cpu_attention(tail_tokens: int | None) -> None:
    """Written by vLLM's own kernel; read back by writing what should have come out."""
    if torch.cpu._is_amx_tile_supported():
        isa, dtype = "vec", torch.float32  # AMX is for bfloat16 only
    else:
        isa, dtype = "vec", torch.bfloat16
    memory = torch.zeros(LAYERS, BLOCKS, HEADS, TOKENS, 2 * SIZE, dtype=dtype)
    keys, values = random_kv()
    tokens = tail_tokens or TOKENS

    def write_by_kernel(layer: int, block: int, k: torch.Tensor, v: torch.Tensor) -> None:
        halves = memory[layer].view(BLOCKS, HEADS, 2 * TOKENS, SIZE).chunk(2, dim=2)
        slots = torch.arange(k.shape[1]) + block * TOKENS
        rows = [half.transpose(0, 1).to(dtype).contiguous() for half in (k, v)]
        ops.cpu_attn_reshape_and_cache(*rows, *halves, slots, isa, 1.0, 1.0, "auto")

    keys[:, :, tokens:] = 1e9
    for layer in range(LAYERS):
        write_by_kernel(layer, 1, keys[layer], values[layer])
        write_by_kernel(layer, 5, keys[layer, :, :tokens], values[layer, :, :tokens])
    pages = cpu_pages(stacked(list(memory), TOKENS), SIZE)
    assert pages.are_tokens_known
    round_trip(pages, Quantization.INT8, tail_tokens)
    found, expected = (
        (pages.keys[:, block, 0].mT.float(), pages.values[:, block, 0].float()) for block in (4, 5)
    )
    rows = [tuple(half[:, :, :tokens] for half in halves) for halves in (found, expected)]
    assert_near(rows[0], rows[1])
    assert torch.equal(
        pages.keys[:, 5, 0].mT.float()[:, :, :tokens], keys[:, :, :tokens].to(dtype).float()
    )


def test_layers_that_lie_elsewhere_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="--alise-kv-host-gib 0"):
        stacked([torch.zeros(5, 2, 16, 8) for _ in range(3)], 16)


def test_pages_of_another_size_are_refused() -> None:
    pages = gpu_pages(stacked([torch.zeros(5, 2, 16, 8)], 16), 4)
    with pytest.raises(ValueError, match="--alise-kv-host-gib 0"):
        BlockCodec(SlotLayout(1, 100, 4, 4, Quantization.INT8), 1, pages)
