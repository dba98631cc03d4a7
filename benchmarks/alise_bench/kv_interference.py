"""What swapping some jobs costs those that go on running: their time between two tokens.

A real engine in this process, a steady batch, and two long jobs that share one more slot. In quiet
rounds the one that has it keeps it; in swapping rounds they change places every few steps, so that
one is stored and the other loaded. The batch is of the same size in both, and rounds take turns.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is told its ranks from here
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what `alise serve` has on two cores
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
from alise_engine.client import Estimate
from alise_engine.default_model import has_fast_bfloat16
from alise_engine.kv_tier import metrics as tier_metrics
from alise_engine.kv_tier.layout import Quantization
from alise_engine.launcher import kv_transfer_config
from alise_engine.scheduler import AliseScheduler
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.request import Request, RequestStatus

_HOST_BYTES: Final = 1 << 30
_WARMUP_STEPS: Final = 20
_ROUND_STEPS: Final = 32
_TOKEN_IDS: Final = (1000, 20_000)
_LONG_TOKENS: Final = 3000.0
_SHORT_TOKENS: Final = 75.0
"""Expected of a job that keeps its slot: too near its end for storing it ahead, and too far from it
for loading the other one already."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Steps of a kind, in ms."""

    steps: int
    median_ms: float
    mean_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Interference:
    """Both kinds of steps of one run."""

    quiet: StepTimes
    swapping: StepTimes
    swaps: int
    swapped_tokens: float
    """Mean context of a job that was swapped out."""
    restored_tokens: float


def measure_interference(
    model: Path, *, steady_jobs: int, context_tokens: int, swap_every: int, rounds: int
) -> Interference:
    """Time the steps of `rounds` quiet and `rounds` swapping rounds."""
    line = _Line(model, steady_jobs, context_tokens)
    times: dict[bool, list[float]] = {False: [], True: []}
    for is_swapping in [False, True] * rounds:
        line.keep()
        line.step()  # settles; not counted
        for number in range(_ROUND_STEPS):
            if is_swapping and number % swap_every == 0:
                line.swap()
            times[is_swapping].append(line.step())
    return Interference(
        quiet=_summary(times[False]),
        swapping=_summary(times[True]),
        swaps=len(line.swapped_tokens),
        swapped_tokens=fmean(line.swapped_tokens),
        restored_tokens=line.restored_tokens(),
    )


def _summary(seconds: list[float]) -> StepTimes:
    ms = [1000 * s for s in seconds]
    return StepTimes(len(ms), median(ms), fmean(ms), float(np.percentile(ms, 99)))


class _Line:
    """The engine with its jobs: a steady batch and two that share a slot."""

    def __init__(self, model: Path, steady_jobs: int, context_tokens: int) -> None:
        os.environ["ALISE_SCHEDULER"] = "unix:///nobody.sock"  # ranks come from here alone
        os.environ["ALISE_STALE_AFTER_S"] = "1e9"
        transfer = KVTransferConfig(
            **json.loads(kv_transfer_config(_HOST_BYTES, Quantization.INT8))
        )
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model),
                dtype="auto" if has_fast_bfloat16() else "float32",
                enforce_eager=True,
                max_num_seqs=steady_jobs + 1,
                max_model_len=2048,
                scheduler_cls=AliseScheduler,
                kv_transfer_config=transfer,
                distributed_executor_backend="uni",
            )
        )
        self._scheduler: Any = self._engine.engine_core.engine_core.scheduler
        self._restored_before = tier_metrics.RESTORED_TOKENS._value.get()
        self._generator = np.random.default_rng(0)
        self._priorities = itertools.count(1, -10)  # each swap's winner goes before all others
        self.swapped_tokens: list[int] = []
        for name in (*(f"steady-{n}" for n in range(steady_jobs)), "first", "second"):
            self._add(name, context_tokens)
            self.step()
        for request in self._scheduler.requests.values():
            self._rank(request, -1e9, _LONG_TOKENS)
        for _ in range(_WARMUP_STEPS // 4):
            self.swap()
            for _ in range(4):
                self.step()
        self.swapped_tokens.clear()

    def _add(self, name: str, tokens: int) -> None:
        prompt = self._generator.integers(*_TOKEN_IDS, tokens).tolist()
        params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def _rank(self, request: Request, priority: float, tokens: float) -> None:
        estimate = Estimate(request.request_id, priority, tokens, request.num_output_tokens)
        self._scheduler._apply(estimate)

    def _pair(self) -> tuple[Request, Request]:
        """Return the two that share a slot, the one that has it first."""
        pair = [
            request
            for request in self._scheduler.requests.values()
            if request.request_id.startswith(("first", "second"))
        ]
        pair.sort(key=lambda request: request.status != RequestStatus.RUNNING)
        return pair[0], pair[1]

    def keep(self) -> None:
        """Let the one that has the slot keep it."""
        running, waiting = self._pair()
        self._rank(running, next(self._priorities), _SHORT_TOKENS)
        self._rank(waiting, 1e6, _LONG_TOKENS)

    def swap(self) -> None:
        """Have the two change places in the next step."""
        running, waiting = self._pair()
        # What the device remembers of the one that comes back is forgotten, as in a full pool.
        pool = self._scheduler.kv_cache_manager.block_pool
        pool.free_blocks(reversed(pool.get_new_blocks(pool.get_num_free_blocks())))
        self.swapped_tokens.append(running.num_computed_tokens)
        self._rank(running, 1e6, _LONG_TOKENS)
        self._rank(waiting, next(self._priorities), _LONG_TOKENS / 2)

    def step(self) -> float:
        """Run a step; return its seconds: each steady job gets a token."""
        began_s = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - began_s

    def restored_tokens(self) -> float:
        """Return how many tokens came back from host memory."""
        return float(tier_metrics.RESTORED_TOKENS._value.get() - self._restored_before)
