"""What keeping KV in INT8 does to a model's answers: perplexity and next tokens, teacher-forced.

Every token's K and V, in every layer, goes through a way of keeping it and back before attention
reads it: as if every block of every answer had been swapped out and in at once. The model is run
by transformers, in float32, so that nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from alise_engine.kv_tier.layout import Quantization, SlotLayout
from alise_engine.kv_tier.pages import gpu_pages, stacked
from alise_engine.kv_tier.quantization import BlockCodec
from transformers import AutoModelForCausalLM, DynamicCache

from alise_bench.dataset import Item

_BLOCK_TOKENS: Final = 16
_MAX_INT8: Final = 127.0
_OLD_KV: Final = 1000.0
"""In rows of a block that no token uses."""

RoundTrip = Callable[[torch.Tensor], torch.Tensor]
"""K or V of one layer, shape (heads, tokens, head size), as it comes back."""


@dataclass(frozen=True, slots=True)
class Granularity:
    """A way of keeping KV."""

    name: str
    keys: RoundTrip
    values: RoundTrip
    bits_per_element: float


@dataclass(frozen=True, slots=True)
class Quality:
    """What a granularity did over all answers, against exact KV."""

    name: str
    bytes_against_bfloat16: float
    perplexity: float
    perplexity_change: float
    top1_agreement: float
    tokens: int


def _rounded(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Quantize `groups`, a view of `x` whose last dimension shares a scale."""
    scale = (groups.abs().amax(-1, keepdim=True) / _MAX_INT8).clamp(min=2.0**-14)
    scale = scale.half().float()
    return ((groups / scale).round().clamp(-_MAX_INT8, _MAX_INT8) * scale).reshape(x.shape)


def tier(block_tokens: int) -> tuple[RoundTrip, RoundTrip]:
    """Return the round trips of K and of V through the tier's own codec."""
    return partial(_tier, block_tokens, is_keys=True), partial(_tier, block_tokens, is_keys=False)


def _tier(block_tokens: int, x: torch.Tensor, *, is_keys: bool) -> torch.Tensor:
    heads, tokens, head_size = x.shape
    blocks = -(-tokens // block_tokens)
    cache = torch.full((blocks, heads, block_tokens, 2 * head_size), _OLD_KV)
    pages = gpu_pages(stacked([cache], block_tokens), head_size)
    # Shape (blocks, heads, tokens, channels).
    half = pages.keys[0, :, 0].mT if is_keys else pages.values[0, :, 0]
    for start in range(0, tokens, block_tokens):
        part = x[:, start : start + block_tokens]
        half[start // block_tokens, :, : part.shape[1]] = part
    elements = heads * block_tokens * 2 * head_size
    layout = SlotLayout(1, elements, 4, head_size, Quantization.INT8)
    codec = BlockCodec(layout, 1, pages)
    slot = torch.empty(1, layout.slot_bytes, dtype=torch.int8)
    for block in range(blocks):
        codec.encode([block], slot, min(tokens - block * block_tokens, block_tokens))
        codec.decode(slot, [block])
    return half.transpose(0, 1).reshape(heads, -1, head_size)[:, :tokens]


def _per_token_head(x: torch.Tensor) -> torch.Tensor:
    return _rounded(x, x)


def _per_token(x: torch.Tensor) -> torch.Tensor:
    by_token = x.transpose(0, 1)
    return _rounded(by_token, by_token.reshape(len(by_token), -1)).transpose(0, 1)


def _by_block(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat([function(part) for part in x.split(_BLOCK_TOKENS, dim=1)], dim=1)


def _per_head(x: torch.Tensor) -> torch.Tensor:
    return _by_block(x, lambda b: _rounded(b, b.reshape(len(b), -1)))


def _per_channel(x: torch.Tensor) -> torch.Tensor:
    return _by_block(x, lambda b: _rounded(b.mT, b.mT.contiguous()).mT)


def _per_group_of_32(x: torch.Tensor) -> torch.Tensor:
    return _rounded(x, x.reshape(*x.shape[:-1], -1, 32))


def _as(dtype: torch.dtype) -> RoundTrip:
    return lambda x: x.to(dtype).to(x.dtype)


def granularities(head_size: int, kv_heads: int) -> list[Granularity]:
    """Return the ways that are compared; `bits_per_element` counts scales."""
    scale = 16.0
    per_token_head = 8 + scale / head_size
    return [
        Granularity("int8, the tier, blocks of 16", *tier(16), per_token_head),
        Granularity("int8, the tier, blocks of 128", *tier(128), per_token_head),
        Granularity("int8, token and head", _per_token_head, _per_token_head, per_token_head),
        Granularity("int8, token row", _per_token, _per_token, 8 + scale / head_size / kv_heads),
        Granularity(
            "int8, head of a block", _per_head, _per_head, 8 + scale / head_size / _BLOCK_TOKENS
        ),
        Granularity(
            "int8, K channel and V token (KIVI)",
            _per_channel,
            _per_token_head,
            8 + scale / 2 * (1 / _BLOCK_TOKENS + 1 / head_size),
        ),
        Granularity("int8, groups of 32", _per_group_of_32, _per_group_of_32, 8 + scale / 32),
        Granularity("bfloat16", _as(torch.bfloat16), _as(torch.bfloat16), 16),
        Granularity("fp8_e4m3 (vLLM's)", _as(torch.float8_e4m3fn), _as(torch.float8_e4m3fn), 8),
        Granularity("fp8_e5m2 (vLLM's)", _as(torch.float8_e5m2), _as(torch.float8_e5m2), 8),
    ]


class _RoundTripCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped to us
    """Gives attention K and V that went through a granularity."""

    def __init__(self, granularity: Granularity) -> None:
        super().__init__()
        self._granularity = granularity

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._granularity.keys(key_states[0])[None]
        values = self._granularity.values(value_states[0])[None]
        result: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, *args, **kwargs)
        return result


def measure_quality(model_folder: Path, items: Sequence[Item]) -> Iterator[Quality]:
    """Yield each granularity's quality on recorded answers, the prompt given."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    config = model.config
    heads = config.num_key_value_heads
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    exact = [_forced(model, item, None) for item in items]
    tokens = sum(len(top1) for _, top1 in exact)
    exact_loss = sum(float(loss.sum()) for loss, _ in exact) / tokens
    for granularity in granularities(head_size, heads):
        loss_sum, agreeing = 0.0, 0
        for item, (_, exact_top1) in zip(items, exact, strict=True):
            loss, top1 = _forced(model, item, granularity)
            loss_sum += float(loss.sum())
            agreeing += int((top1 == exact_top1).sum())
        perplexity = math.exp(loss_sum / tokens)
        yield Quality(
            name=granularity.name,
            bytes_against_bfloat16=granularity.bits_per_element / 16,
            perplexity=perplexity,
            perplexity_change=perplexity / math.exp(exact_loss) - 1,
            top1_agreement=agreeing / tokens,
            tokens=tokens,
        )


def _forced(
    model: Any, item: Item, granularity: Granularity | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and most likely token at each position of the recorded answer."""
    ids = torch.tensor([[*item.prompt_ids, *item.answer_ids]])
    cache = DynamicCache() if granularity is None else _RoundTripCache(granularity)
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0].float()
    start = len(item.prompt_ids)
    predicted = logits[start - 1 : -1]
    loss = torch.nn.functional.cross_entropy(predicted, ids[0, start:], reduction="none")
    return loss, predicted.argmax(-1)
