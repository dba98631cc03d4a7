"""Where K and V lie in vLLM's KV cache: views of it by layer, block, head, token and channel.

vLLM hands over one tensor for each layer, of logical shape (kernel blocks, heads, tokens, content),
whose strides say how it lies in memory: heads or tokens first, layers or blocks outermost (all of
`KVCacheLayout`'s orders). On GPUs a head's content of one token is K, then V. vLLM's CPU attention
has for each head all K by channels, then all V by tokens. It knows nothing of slots or scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

_ISAS_WITH_TOKEN_ROWS = ("vec", "vec16")
"""Others (AMX) mix tokens and channels within a head's half, in pieces of 16 tokens."""


@dataclass(frozen=True, slots=True)
class KvPages:
    """Views of the KV cache; none is a copy. A block has one or more *parts*, kernel blocks."""

    whole: torch.Tensor
    """Shape (layers, blocks, ...): each page in the order of its memory."""
    keys: torch.Tensor
    """Shape (layers, blocks, parts, heads, channels, tokens)."""
    values: torch.Tensor
    """Shape (layers, blocks, parts, heads, tokens, channels)."""
    are_tokens_known: bool = True
    """Whether `tokens` above are tokens; else they and the channels are mixed in some order."""


def stacked(caches: Sequence[torch.Tensor], block_tokens: int) -> torch.Tensor:
    """Return the KV tensors of all layers as one, without a copy.

    Args:
        caches: of each layer, shape (kernel blocks, heads, tokens, content).
        block_tokens: tokens of a block, one or more kernel blocks.

    Returns:
        Shape (layers, blocks, parts, heads, tokens, content).

    Raises:
        ValueError: the layers don't lie at equal distances in one allocation.

    """
    first = caches[0]
    starts = [cache.data_ptr() for cache in caches]
    step = starts[1] - starts[0] if len(starts) > 1 else 0
    is_regular = all(start == starts[0] + i * step for i, start in enumerate(starts)) and all(
        cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and cache.shape == first.shape
        and cache.stride() == first.stride()
        for cache in caches
    )
    if not is_regular or step < 0 or first.dim() != 4 or block_tokens % first.shape[2]:
        raise ValueError(
            "The KV tier does not know this layout of the KV cache; serve with "
            "--alise-kv-host-gib 0"
        )
    one = first.unflatten(0, (-1, block_tokens // first.shape[2]))
    return one.as_strided((len(caches), *one.shape), (step // first.element_size(), *one.stride()))


def gpu_pages(cache: torch.Tensor, head_size: int) -> KvPages:
    """Return the views where a token's content of a head is K, then V (see `stacked`)."""
    return KvPages(
        whole=_by_memory(cache),
        keys=cache[..., :head_size].transpose(-1, -2),
        values=cache[..., head_size:],
    )


def cpu_pages(cache: torch.Tensor, head_size: int) -> KvPages:
    """Return the views of the cache of vLLM's CPU attention (see `stacked`)."""
    tokens = cache.shape[-2]
    halves = cache.view(*cache.shape[:-2], 2, -1)
    isa = _get_attn_isa(cache.dtype, tokens, head_size)
    return KvPages(
        whole=_by_memory(cache),
        keys=halves[..., 0, :].unflatten(-1, (-1, tokens)),
        values=halves[..., 1, :].unflatten(-1, (tokens, -1)),
        are_tokens_known=isa in _ISAS_WITH_TOKEN_ROWS,
    )


def _by_memory(cache: torch.Tensor) -> torch.Tensor:
    inner = sorted(range(2, cache.dim()), key=lambda dim: -cache.stride(dim))
    return cache.permute(0, 1, *inner)
