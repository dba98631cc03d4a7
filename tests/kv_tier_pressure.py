"""A real engine under pressure, in one process: a tiny KV pool and host tier, aborts, faults.

`python tests/kv_tier_pressure.py 500 OUT.json` runs 500 requests and writes what happened. Every
answer is then checked token by token, teacher-forced by the same engine without pressure; a lossy
or wrong KV block would have made tokens that the model would not have chosen.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its scheduler is looked into
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more wait for each other where cores are busy
os.environ["ALISE_SCHEDULER"] = "unix:///nobody.sock"

from alise_bench.dataset import load_dataset, packaged_dataset, tokenize
from alise_engine import metrics
from alise_engine import scheduler as plugin
from alise_engine.client import Estimate
from alise_engine.default_model import ensure_default_model
from alise_engine.kv_tier import metrics as tier_metrics
from alise_engine.kv_tier.layout import Quantization
from alise_engine.launcher import kv_transfer_config
from fakes import FakeClient
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

BLOCK_TOKENS, BLOCKS, SLOTS = 32, 24, 16
MAX_MODEL_LEN = 640
HOST_BYTES = 16 << 20
ANSWER_TOKENS = (8, 56)
MARGIN = 0.1
"""A token this much less likely (natural logarithm) than the best is not the model's choice."""
PATIENCE_S = 900.0
FAULT_EVERY = 40
"""Of this many copies in one direction one fails and one is slow."""


class Faults:
    """Breaks copies now and then: errors and delays both ways, flipped bits in host memory.

    Copies break by their number, not by chance, so that each kind of fault is met in any run.
    """

    def __init__(self, worker: Any, generator: random.Random) -> None:
        self._generator = generator
        self._rows = worker._memory.rows
        self.is_on = True
        self.counts: Counter[str] = Counter()
        for name in ("encode", "decode"):
            setattr(worker._codec, name, self._breaking(name, getattr(worker._codec, name)))

    def _breaking(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        numbers = itertools.count()

        def call(*args: Any) -> None:
            turn = next(numbers) % FAULT_EVERY if self.is_on else -1
            if turn == FAULT_EVERY // 4:
                self.counts[f"{name} failed"] += 1
                raise RuntimeError("injected")
            if turn == FAULT_EVERY // 2:
                self.counts[f"{name} slow"] += 1
                time.sleep(0.05)
            function(*args)

        return call

    def flip_a_bit(self) -> None:
        if self.is_on and self._generator.random() < 0.2:
            self.counts["bit flipped"] += 1
            row = self._generator.randrange(self._rows.shape[0])
            self._rows[row, self._generator.randrange(self._rows.shape[1])] ^= 4


def start() -> tuple[LLMEngine, Any]:
    """Return the engine and its scheduler, whose ranks come from a `FakeClient`."""
    plugin.SidecarClient = FakeClient  # type: ignore[misc]
    transfer = KVTransferConfig(**json.loads(kv_transfer_config(HOST_BYTES, Quantization.INT8)))
    arguments = EngineArgs(
        model=str(ensure_default_model()),
        # bfloat16 tells logits above 16 apart by 0.125, which is more than MARGIN: how the CPU
        # rounds would decide.
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK_TOKENS,
        num_gpu_blocks_override=BLOCKS,
        max_num_seqs=SLOTS,
        max_model_len=MAX_MODEL_LEN,
        scheduler_cls=plugin.AliseScheduler,
        kv_transfer_config=transfer,
        distributed_executor_backend="uni",
    )
    engine = LLMEngine.from_engine_args(arguments)
    return engine, engine.engine_core.engine_core.scheduler


def press(
    engine: LLMEngine, scheduler: Any, faults: Faults, prompts: list[list[int]]
) -> tuple[dict[str, list[int]], set[str], int]:
    """Return the answers by request, the requests that their clients ended, and the steps."""
    generator = random.Random(7)
    answers: dict[str, list[int]] = {}
    aborted: set[str] = set()
    live: set[str] = set()
    to_come = list(enumerate(prompts))
    steps, deadline_s = 0, time.monotonic() + PATIENCE_S
    while to_come or live:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no end: {len(live)} live, {len(to_come)} to come")
        while to_come and len(live) < 2 * SLOTS and generator.random() < 0.7:
            number, prompt = to_come.pop(0)
            tokens = generator.randint(*ANSWER_TOKENS)
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            live.add(str(number))
        for request in list(scheduler.requests.values()):
            if generator.random() < 0.05:  # a job of seconds may be worth preempting
                priority, tokens = 100 * generator.random(), generator.randrange(1, 300)
                out = request.num_output_tokens
                scheduler._client.estimates.append(
                    Estimate(request.request_id, priority, tokens, out)
                )
        if generator.random() < 0.02 and live:
            leaving = generator.choice(sorted(live))
            engine.abort_request([leaving])
            live.remove(leaving)
            aborted.add(leaving)
        faults.flip_a_bit()
        for output in engine.step():
            if output.finished and output.request_id in live:
                live.remove(output.request_id)
                answers[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    return answers, aborted, steps


def settle(engine: LLMEngine) -> None:
    """Give copies under way the steps that they need to be reported."""
    for number in range(5):
        params = SamplingParams(temperature=0, max_tokens=2)
        engine.add_request(f"settle-{number}", {"prompt_token_ids": [1, 2, 3]}, params)
        while engine.has_unfinished_requests():
            engine.step()


def poor_tokens(engine: LLMEngine, prompt: list[int], answer: list[int]) -> int:
    """Return how many tokens of an answer the model would not have chosen."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    engine.add_request("forced", {"prompt_token_ids": prompt + answer}, params)
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs = engine.step() or outputs
    candidates = outputs[-1].prompt_logprobs[len(prompt) :]
    return sum(
        max(entry.logprob for entry in entries.values()) - entries[token].logprob > MARGIN
        for token, entries in zip(answer, candidates, strict=True)
    )


def run(requests: int) -> dict[str, Any]:
    """Run `requests` requests and return what happened."""
    folder = ensure_default_model()
    items = tokenize(
        load_dataset(packaged_dataset(), need_response=False),
        AutoTokenizer.from_pretrained(folder),
        max_model_len=128,
        max_tokens=64,
        with_answers=False,
    ).items
    # Each prompt has a beginning of its own: most KV is nobody else's.
    prompts = [
        [1000 + number, *items[number % len(items)].prompt_ids] for number in range(requests)
    ]
    engine, scheduler = start()
    worker = get_kv_transfer_group().connector_worker.worker
    pool = scheduler.kv_cache_manager.block_pool
    tier = scheduler.connector.connector_scheduler

    def held() -> dict[str, int]:
        return {
            "device blocks": pool.num_gpu_blocks - pool.get_num_free_blocks(),
            "host slots": tier.manager.used_slots(),
            "copies": len(tier._jobs),
            "jobs": len(scheduler.requests) + len(tier._req_status),
        }

    settle(engine)
    held_before = held()
    faults = Faults(worker, random.Random(11))
    restored: set[str] = set()
    note = worker.submit_load

    def noting(job_id: int, *specs: Any) -> bool:
        restored.add(tier._loads[job_id].job_id)
        result: bool = note(job_id, *specs)
        return result

    worker.submit_load = noting
    began_s = time.monotonic()
    answers, aborted, steps = press(engine, scheduler, faults, prompts)
    pressed_s = time.monotonic() - began_s
    faults.is_on = False
    settle(engine)
    held_after = held()
    poor = {name: poor_tokens(engine, prompts[int(name)], a) for name, a in answers.items()}
    first, second = sorted(answers)[:2]
    mixed_up = poor_tokens(engine, prompts[int(first)], answers[second])
    restored = {name.partition("-")[0] for name in restored}
    return {
        "requests": requests,
        "answered": len(answers),
        "aborted": len(aborted),
        "steps": steps,
        "seconds": pressed_s,
        "restored_jobs": len(restored),
        "preempted_tokens": metrics.PREEMPTED_TOKENS._value.get(),
        "restored_tokens": tier_metrics.RESTORED_TOKENS._value.get(),
        "checksum_failures": tier_metrics.CHECKSUM_FAILURES._value.get(),
        "faults": dict(faults.counts),
        "host_slots": tier.manager.slots,
        "held_before": held_before,
        "held_after": held_after,
        "tokens": sum(map(len, answers.values())),
        "poor_tokens": sum(poor.values()),
        "tokens_of_restored": sum(len(a) for n, a in answers.items() if n in restored),
        "poor_tokens_of_restored": sum(poor[n] for n in poor if n in restored),
        "poor_share_of_another_answer": mixed_up / len(answers[second]),
        "worst_answer": max(poor[name] / len(answers[name]) for name in poor),
    }


if __name__ == "__main__":
    result = run(int(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1), encoding="utf-8")
