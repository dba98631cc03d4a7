"""The KV tier as a vLLM KV connector: stock `OffloadingConnector` with our two halves in it.

The stock one writes every block through as it fills. Ours stores what `TierScheduler` chooses, and
reports damaged blocks, so that vLLM computes them again.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_cache_interface import KVCacheConfig

from alise_engine.kv_tier.scheduler import TierScheduler
from alise_engine.kv_tier.spec import SETTINGS_KEY, QuantizedOffloadingSpec, read_settings


class AliseOffloadingConnector(OffloadingConnector):  # type: ignore[misc]  # vLLM is untyped to us
    """`--kv-transfer-config '{"kv_connector": "AliseOffloadingConnector", ...}'`."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        # Not the parent's: it would make the stock halves.
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        extra_config[SETTINGS_KEY] = read_settings(extra_config, vllm_config, kv_cache_config)
        config = build_offloading_config(vllm_config, kv_cache_config)
        self._canonical_layout = config.canonical_layout
        spec = QuantizedOffloadingSpec(config)
        self.connector_scheduler: TierScheduler | None = None
        self.connector_worker: OffloadingConnectorWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = TierScheduler(spec, vllm_config, kv_cache_config)
        else:
            self.connector_worker = OffloadingConnectorWorker(spec, vllm_config, kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Hand the KV tensors over as they are: the stock one would make plain bytes of them."""
        assert self.connector_worker is not None
        self.connector_worker._init_worker(kv_caches)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the device blocks that could not be filled; vLLM computes them again."""
        assert self.connector_worker is not None
        worker = self.connector_worker.worker
        return worker.take_invalid_blocks() if worker is not None else set()
