"""A model runner for tests of the KV tier: real scheduler, connector and worker; made-up KV.

The KV of a token is a function of the tokens up to it, as a model's is. In each step every
scheduled request's KV is read back and compared with that function, so a lost, swapped, leaked or
damaged block is seen by the token that would have come out wrong.
"""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alise_bench.scheduler_setup import ANY_TOKEN_ID, BLOCK_SIZE, EOS_TOKEN_ID, build_scheduler
from alise_engine.kv_tier.connector import AliseOffloadingConnector
from alise_engine.kv_tier.layout import Quantization
from alise_engine.kv_tier.scheduler import TierScheduler
from alise_engine.launcher import kv_transfer_config
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request

LAYERS = 2
HEAD_SIZE = 8
TOKEN_ELEMENTS = 2 * HEAD_SIZE  # K and V of one head
_WAVES = np.arange(TOKEN_ELEMENTS) * 0.7


def true_kv(tokens: list[int]) -> np.ndarray:
    """Return the KV of all of `tokens`, shape (tokens, TOKEN_ELEMENTS), float32."""
    digests = np.empty(len(tokens))
    digest = 1
    for place, token in enumerate(tokens):
        digest = (31 * digest + token + 7) % 100_003
        digests[place] = digest
    return np.sin(digests[:, None] + _WAVES).astype(np.float32)


class TierEngine:
    """An engine without a model: schedules, "computes" KV, moves it, and checks it."""

    def __init__(
        self,
        scheduler_class: type[Any],
        folder: Path,
        *,
        host_bytes: int = 1 << 20,
        quantization: Quantization = Quantization.INT8,
        batches_in_flight: int = 1,
        **options: Any,
    ) -> None:
        transfer = KVTransferConfig(**json.loads(kv_transfer_config(host_bytes, quantization)))
        self.scheduler = build_scheduler(
            scheduler_class,
            folder,
            kv_transfer=transfer,
            layers=LAYERS,
            head_size=HEAD_SIZE,
            async_scheduling=batches_in_flight > 1,
            **options,
        )
        self._batches_in_flight = batches_in_flight
        self._in_flight: deque[tuple[SchedulerOutput, KVConnectorOutput, set[str]]] = deque()
        self.quantization = quantization
        self.tier: TierScheduler = self.scheduler.connector.connector_scheduler
        blocks = self.scheduler.kv_cache_config.num_blocks
        self.pages = torch.zeros(LAYERS, blocks, 1, BLOCK_SIZE, TOKEN_ELEMENTS)
        # As vLLM's CPU attention has them: K by channels, then V by tokens.
        halves = self.pages.view(LAYERS, blocks, 2, -1)
        self.keys = halves[:, :, 0].view(LAYERS, blocks, HEAD_SIZE, BLOCK_SIZE).mT
        self.values = halves[:, :, 1].view(LAYERS, blocks, BLOCK_SIZE, HEAD_SIZE)
        self.connector = AliseOffloadingConnector(
            self.scheduler.vllm_config, KVConnectorRole.WORKER, self.scheduler.kv_cache_config
        )
        self.connector.register_kv_caches({f"layer {i}": self.pages[i] for i in range(LAYERS)})
        self.worker = self.connector.connector_worker.worker
        self.finished: dict[str, int] = {}  # req_id -> output tokens
        self.restored_jobs: set[str] = set()
        self.steps = 0

    def step(self, ending: set[str] | None = None) -> SchedulerOutput:
        """Run one iteration; jobs in `ending` end with its token."""
        self.steps += 1
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.scheduler.get_grammar_bitmask(output)  # asked once the batch is on its way
        meta = output.kv_connector_metadata
        worker = self.connector.connector_worker
        self.connector.bind_connector_metadata(meta)
        self.restored_jobs |= {job.req_id for job in meta.load_jobs.values()}
        worker.handle_preemptions(meta)
        for job_id, count in output.num_scheduled_tokens.items():
            self._compute(self.scheduler.requests[job_id], count)
        worker.start_kv_transfers(meta)
        worker.prepare_store_kv(meta)
        _, received = worker.get_finished(output.finished_req_ids)
        transfers = KVConnectorOutput(
            finished_recving=received or None,
            invalid_block_ids=self.connector.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=self.connector.build_connector_worker_meta(),
        )
        past_prompt = {
            job_id
            for job_id in output.num_scheduled_tokens
            if not self.scheduler.requests[job_id].is_prefill_chunk
        }
        self._in_flight.append((output, transfers, past_prompt))
        while len(self._in_flight) >= self._batches_in_flight:
            self._answer(*self._in_flight.popleft(), ending or set())
        return output

    def _compute(self, request: Request, count: int) -> None:
        """Check the KV of a request's context, then write that of the scheduled tokens."""
        end = request.num_computed_tokens  # vLLM counts scheduled tokens as computed
        start = end - count
        known = list(request.all_token_ids[:end])
        # Tokens of a batch in flight: the model knows them, the scheduler does not yet.
        tokens = known + [ANY_TOKEN_ID] * (end - len(known))
        truth = torch.from_numpy(true_kv(tokens))
        (block_ids,) = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        rows = torch.arange(end) % BLOCK_SIZE
        blocks = torch.tensor([block_ids[t // BLOCK_SIZE] for t in range(end)])
        is_lossy = (
            request.request_id in self.restored_jobs and self.quantization == Quantization.INT8
        )
        for layer, halves in enumerate(zip(self.keys, self.values, strict=True)):
            kept = torch.cat([half[blocks[:start], rows[:start]] for half in halves], -1)
            error = (kept - truth[:start] * (layer + 1)).abs()
            allowed = 0.02 * (layer + 1) if is_lossy else 0.0
            worst = float(error.max()) if error.numel() else 0.0
            assert worst <= allowed, f"{request.request_id}: KV off by {worst} in layer {layer}"
            for half, new in zip(halves, truth[start:].split(HEAD_SIZE, -1), strict=True):
                half[blocks[start:], rows[start:]] = new * (layer + 1)

    def _answer(
        self,
        output: SchedulerOutput,
        transfers: KVConnectorOutput,
        past_prompt: set[str],
        ending: set[str],
    ) -> None:
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for job_id in ids:
            token = EOS_TOKEN_ID if job_id in ending else ANY_TOKEN_ID
            sampled.append([token] if job_id in past_prompt else [])
        outputs = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={job_id: index for index, job_id in enumerate(ids)},
                sampled_token_ids=sampled,
                kv_connector_output=transfers,
            ),
        )
        for client in outputs.values():
            for item in client.outputs:
                if item.finish_reason is not None:
                    self.finished[item.request_id] = 1

    def run(self, until: int, *, limit: int = 20_000) -> None:
        """Step until so many requests have ended; fails after `limit` steps (a deadlock)."""
        while len(self.finished) < until:
            assert self.steps < limit, f"no end: {len(self.finished)} of {until} ended"
            self.step()

    def settle(self) -> None:
        """Step until nothing is under way."""
        for _ in range(5):
            self.step()

    def drain(self) -> None:
        """Process what is in flight."""
        while self._in_flight:
            self._answer(*self._in_flight.popleft(), set())

    def free_blocks(self) -> int:
        """Return the device blocks that nobody holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def random_aborts(engine: TierEngine, generator: random.Random, share: float) -> set[str]:
    """Abort some of the live requests; return their ids."""
    from vllm.v1.request import RequestStatus

    live = [r.request_id for r in engine.scheduler.requests.values() if not r.is_finished()]
    chosen = {job_id for job_id in live if generator.random() < share}
    engine.scheduler.finish_requests(chosen, RequestStatus.FINISHED_ABORTED)
    return chosen
