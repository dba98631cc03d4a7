"""The KV tier as vLLM's `OffloadingSpec`: what it holds, for which models, and its two halves.

Serves models whose KV cache is one group of plain attention layers, all alike. Others (MLA, sliding
windows, Mamba and hybrids of these, draft models of another shape, pipeline and context
parallelism, a quantized KV cache with INT8) are served without the tier, and a warning says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    OffloadingSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from alise_engine.kv_tier.layout import Quantization, SlotLayout, slots_within
from alise_engine.kv_tier.manager import HostSlots, HostTierManager
from alise_engine.kv_tier.pages import cpu_pages, gpu_pages, stacked
from alise_engine.kv_tier.worker import STAGING_SLOTS, TierWorker

logger = init_logger("vllm.alise.kv_tier")

SETTINGS_KEY = "alise_kv_tier"
"""Where the connector puts `TierSettings` among vLLM's extra configuration."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class TierSettings:
    """What vLLM's `OffloadingConfig` does not say."""

    host_bytes: int
    """Bound on host memory of all workers together."""
    quantization: Quantization
    page_bytes: int
    """Of one layer in one block, without padding."""
    head_size: int
    """Also how many elements share a scale."""
    unsupported: str | None
    """Why this model is served without the tier; None when it is served with it."""


def read_settings(
    extra_config: Mapping[str, Any], vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> TierSettings:
    """Return the settings from `--kv-transfer-config`'s extra configuration and the model."""
    quantization = Quantization(extra_config.get("quantization", Quantization.INT8.value))
    groups = kv_cache_config.kv_cache_groups
    unsupported = unsupported_reason(vllm_config, kv_cache_config, quantization)
    spec = groups[0].kv_cache_spec if not unsupported else None
    return TierSettings(
        host_bytes=int(extra_config.get("host_bytes", 0)),
        quantization=quantization,
        page_bytes=spec.unpadded_page_size_bytes if spec is not None else 0,
        head_size=spec.head_size if spec is not None else 1,
        unsupported=unsupported,
    )


def unsupported_reason(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, quantization: Quantization
) -> str | None:
    """Return why the tier can't serve this model; None when it can.

    Scheduler and workers come to the same answer: each asks for itself.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"its KV cache has {len(groups)} groups (a hybrid model); one is supported"
    # One for each shape of layer. The group says so only in workers: for the scheduler vLLM puts
    # one layer's shape in the place of all.
    if len(kv_cache_config.kv_cache_tensors) > 1:
        return "its layers' KV caches differ in shape (a draft model's, for one); one is supported"
    spec = groups[0].kv_cache_spec
    if isinstance(spec, MLAAttentionSpec) or not isinstance(spec, FullAttentionSpec):
        return f"its KV cache is of the kind {type(spec).__name__}; plain attention is supported"
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism is on"
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is on, whose stages may differ in layers and so in slots"
    cache_dtype = vllm_config.cache_config.cache_dtype
    if quantization == Quantization.INT8 and cache_dtype not in ("auto", *_DTYPES):
        return (
            f"--kv-cache-dtype {cache_dtype} is quantized already; "
            "use --alise-kv-quantization none with it"
        )
    if quantization == Quantization.INT8 and not _has_plain_heads(spec):
        return (
            "K and V do not lie head by head in its KV cache, or differ in size; "
            "use --alise-kv-quantization none with it"
        )
    return None


def _has_plain_heads(spec: FullAttentionSpec) -> bool:
    """Say whether each head's content of a token is K and V, and nothing else."""
    is_one_size: bool = spec.head_size == spec.head_size_v
    return is_one_size and spec.num_head_slots is None and spec.state_content_bytes is None


class QuantizedOffloadingSpec(OffloadingSpec):  # type: ignore[misc]  # vLLM is untyped to us
    """The tier's manager (scheduler side) and worker for one engine."""

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self.offload_prompt_only = False
        settings: TierSettings = self.extra_config[SETTINGS_KEY]
        self.settings = settings
        self.layout: SlotLayout | None = None
        self.slots = 0
        if settings.unsupported is not None or not config.worker_kv_bytes_per_block:
            return
        element_bytes = _DTYPES.get(config.model.dtype, torch.int8).itemsize
        self.layout = SlotLayout(
            layers=len(config.groups[0].layer_names),
            page_elements=settings.page_bytes // element_bytes,
            element_bytes=element_bytes,
            group=settings.head_size,
            quantization=settings.quantization,
        )
        self.slots = slots_within(
            settings.host_bytes, config.parallel.world_size, self.layout, STAGING_SLOTS
        )

    def get_manager(self) -> HostTierManager:
        """Return the scheduler's half; it holds nothing when the model is not supported."""
        if self.layout is None:
            logger.warning(
                "The KV tier is off for this model: %s. Preempted jobs are recomputed",
                self.settings.unsupported or "its KV cache is empty",
            )
        else:
            logger.info(
                "KV tier: %d blocks of %d tokens in host memory (%s, %.2f of the device's bytes)",
                self.slots,
                self.tokens_per_block[0],
                self.settings.quantization.value,
                self.layout.bytes_per_slot
                / (self.layout.block_elements * self.layout.element_bytes),
            )
        return HostTierManager(self.slots)

    def get_worker(self, kv_caches: Mapping[str, torch.Tensor]) -> OffloadingWorker:
        """Return a worker's half for vLLM's KV tensors, by layer (see `pages`)."""
        if self.layout is None:
            return _NoWorker()
        caches = [kv_caches[name] for name in self.config.groups[0].layer_names]
        cache = stacked(caches, self.tokens_per_block[0])
        view = cpu_pages if cache.device.type == "cpu" else gpu_pages
        return TierWorker(view(cache, self.settings.head_size), self.layout, self.slots)


class _NoWorker(OffloadingWorker):  # type: ignore[misc]  # vLLM is untyped to us
    """Stands where the tier is off: whatever is asked of it, blocks are computed again."""

    def __init__(self) -> None:
        self._invalid_blocks: set[int] = set()
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, *_: Any) -> bool:
        self._finished.append(TransferResult(job_id, success=True))
        return True

    def submit_load(self, job_id: int, _: HostSlots, dst_spec: GPULoadStoreSpec) -> bool:
        self._invalid_blocks.update(dst_spec.block_ids.tolist())
        self._finished.append(TransferResult(job_id, success=True))
        return True

    def take_invalid_blocks(self) -> set[int]:
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, *_: Any) -> None:
        return
