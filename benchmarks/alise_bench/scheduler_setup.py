"""Real vLLM schedulers without a model, as vLLM's own tests build them.

The model's answer is made up: a token for each job past its prompt, the end for jobs named.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

PROMPT_TOKENS: Final = 12
BLOCK_SIZE: Final = 16
_MAX_MODEL_LEN: Final = 4096
EOS_TOKEN_ID: Final = 2
ANY_TOKEN_ID: Final = 7
_TINY_LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": _MAX_MODEL_LEN,
    "eos_token_id": EOS_TOKEN_ID,
    "torch_dtype": "float32",
}


def build_scheduler(
    scheduler_class: type[Any],
    folder: Path,
    *,
    slots: int = 4,
    policy: str = "fcfs",
    blocks: int | None = None,
    max_num_batched_tokens: int = 8192,
    async_scheduling: bool = False,
    kv_transfer: KVTransferConfig | None = None,
    layers: int = 1,
    head_size: int = 1,
) -> Any:
    """Return a scheduler of a tiny Llama that is never loaded; `folder` gets its configuration.

    KV blocks never run out unless `blocks` says how many there are; `kv_transfer` puts a KV
    connector behind it, for a KV cache of `layers` layers with one head of `head_size`.
    """
    (folder / "config.json").write_text(json.dumps(_TINY_LLAMA), encoding="utf-8")
    blocks = blocks or slots * _MAX_MODEL_LEN // BLOCK_SIZE + 1
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=_MAX_MODEL_LEN,
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=slots,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=_MAX_MODEL_LEN,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            policy=policy,
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=kv_transfer,
    )
    # The platform of the CPU build turns it off; schedulers must be right in both modes.
    config.scheduler_config.async_scheduling = async_scheduling
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=head_size, dtype=torch.float32
    )
    init_none_hash(sha256)
    return scheduler_class(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([f"layer {i}" for i in range(layers)], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )


def prompt_of(number: int) -> list[int]:
    """Return the prompt of the `number`-th job: all differ."""
    return [10 + (number // 900**place) % 900 for place in range(PROMPT_TOKENS)]


def build_request(number: int) -> Request:
    """Return the `number`-th job."""
    return Request(
        request_id=f"job-{number}",
        prompt_token_ids=prompt_of(number),
        sampling_params=SamplingParams(max_tokens=_MAX_MODEL_LEN - PROMPT_TOKENS),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def answer(scheduler: Scheduler, output: SchedulerOutput, ending: Collection[str]) -> Any:
    """Give `scheduler` what a model would for `output`; jobs in `ending` end. Returns its outputs.

    A job that is gone by now gets a token, too: the model did not know.
    """
    ids = list(output.num_scheduled_tokens)
    sampled = []
    for job_id in ids:
        request = scheduler.requests.get(job_id)
        is_past_prompt = request is None or not request.is_prefill_chunk
        token_id = EOS_TOKEN_ID if job_id in ending else ANY_TOKEN_ID
        sampled.append([token_id] if is_past_prompt else [])
    model_output = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={job_id: index for index, job_id in enumerate(ids)},
        sampled_token_ids=sampled,
    )
    return scheduler.update_from_output(output, model_output)
