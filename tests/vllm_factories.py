"""Real vLLM schedulers and requests without a model: no weights, no tokenizer, no network."""

from __future__ import annotations

import itertools
import json
from collections import deque
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
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

BLOCK_SIZE = 16
EOS_TOKEN_ID = 2
_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "eos_token_id": EOS_TOKEN_ID,
    "torch_dtype": "float32",
}
_numbers = itertools.count()


def create_scheduler(
    scheduler_class: type[Scheduler],
    folder: Path,
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 2048,
    num_blocks: int = 1000,
    async_scheduling: bool = False,
    policy: str = "fcfs",
) -> Scheduler:
    """Return a scheduler of `scheduler_class` for a tiny Llama that is never loaded."""
    (folder / "config.json").write_text(json.dumps(_TINY_LLAMA))
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=2048
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=2048,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=async_scheduling,
            policy=policy,
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
    )
    # The platform of the CPU build turns it off; the scheduler must be right in both modes.
    config.scheduler_config.async_scheduling = async_scheduling
    config.cache_config.num_gpu_blocks = num_blocks
    kv_cache_config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec(
                ["layer"],
                FullAttentionSpec(
                    block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
                ),
            )
        ],
    )
    init_none_hash(sha256)
    return scheduler_class(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )


def create_request(
    *, prompt_tokens: int = 10, max_tokens: int = 500, priority: int = 0, **changes: Any
) -> Request:
    """Return a request with a prompt of its own."""
    number = next(_numbers)
    return Request(
        request_id=changes.pop("request_id", f"job-{number}"),
        prompt_token_ids=[3 + (number + i) % 900 for i in range(prompt_tokens)],
        sampling_params=SamplingParams(
            max_tokens=max_tokens, stop_token_ids=[EOS_TOKEN_ID], **changes
        ),
        pooling_params=None,
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def run_model(output: SchedulerOutput, scheduler: Scheduler, stops: set[str]) -> ModelRunnerOutput:
    """Return what a model would: a token for each job past its prompt; EOS for `stops`."""
    job_ids = list(output.num_scheduled_tokens)
    sampled = []
    for job_id in job_ids:
        request = scheduler.requests.get(job_id)
        done = request is None or not request.is_prefill_chunk
        sampled.append([EOS_TOKEN_ID if job_id in stops else 7] if done else [])
    return ModelRunnerOutput(
        req_ids=job_ids,
        req_id_to_index={job_id: i for i, job_id in enumerate(job_ids)},
        sampled_token_ids=sampled,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


class Driver:
    """Runs a scheduler as vLLM's engine core does: with one batch in flight, or with two."""

    def __init__(self, scheduler: Scheduler, *, batches_in_flight: int = 1) -> None:
        self.scheduler = scheduler
        self._batches_in_flight = batches_in_flight
        self._in_flight: deque[SchedulerOutput] = deque()
        self.tokens: dict[str, int] = {}  # req_id -> tokens delivered
        self.finished: list[str] = []

    def step(self, stops: set[str] | None = None) -> SchedulerOutput:
        """Schedule one iteration; process the output of the oldest one when enough are under way.

        Jobs in `stops` end with the token of the iteration that is processed.
        """
        output = self.scheduler.schedule()
        self._in_flight.append(output)
        while len(self._in_flight) >= self._batches_in_flight:
            self._process(self._in_flight.popleft(), stops or set())
        return output

    def drain(self) -> None:
        """Process what is in flight."""
        while self._in_flight:
            self._process(self._in_flight.popleft(), set())

    def _process(self, output: SchedulerOutput, stops: set[str]) -> None:
        model_output = run_model(output, self.scheduler, stops)
        for client in self.scheduler.update_from_output(output, model_output).values():
            for item in client.outputs:
                self.tokens[item.request_id] = self.tokens.get(item.request_id, 0) + len(
                    item.new_token_ids
                )
                if item.finish_reason is not None:
                    self.finished.append(item.request_id)
