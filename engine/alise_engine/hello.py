"""How the engine introduces itself to the sidecar."""

from __future__ import annotations

import uuid

import vllm
from alise_scheduler import protocol
from alise_scheduler.v1 import scheduler_pb2 as pb
from vllm.config import VllmConfig

from alise_engine.settings import EngineSettings
from alise_engine.token_table_process import ensure_token_table


class HelloMaker:
    """Says who this engine is; called on the stream's thread before each connect."""

    def __init__(self, config: VllmConfig, max_num_seqs: int, settings: EngineSettings) -> None:
        self._model_config = config.model_config
        self._download_dir: str | None = config.load_config.download_dir
        self._max_num_seqs = max_num_seqs
        cache = config.cache_config
        self._block_tokens: int = cache.block_size or 0
        self._kv_tokens = (cache.num_gpu_blocks or 0) * self._block_tokens
        self._batched_tokens: int = config.scheduler_config.max_num_batched_tokens
        self._shared_dir = settings.shared_dir
        self._engine_id = uuid.uuid4().hex
        self._token_table_file: str | None = None

    def __call__(self) -> pb.Hello:
        """Return the first message of a stream; the first call may take a while."""
        model = self._model_config
        if self._token_table_file is None:
            self._token_table_file = (
                ensure_token_table(
                    model.model, model.revision, self._download_dir, self._shared_dir
                )
                if self._shared_dir is not None
                else ""
            )
        served = model.served_model_name
        return pb.Hello(
            protocol_version=protocol.PROTOCOL_VERSION,
            engine_id=self._engine_id,
            engine_version=vllm.__version__,
            model=served[0] if isinstance(served, list) else served,
            max_model_len=model.max_model_len,
            max_num_seqs=self._max_num_seqs,
            token_table_file=self._token_table_file,
            kv_tokens=self._kv_tokens,
            block_tokens=self._block_tokens,
            max_num_batched_tokens=self._batched_tokens,
        )
