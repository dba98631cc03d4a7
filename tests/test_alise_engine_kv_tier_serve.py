"""The KV tier behind a real model: a KV cache so small that vLLM itself preempts all the time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from alise_engine.default_model import DEFAULT_MODEL_NAME
from live_server import Server, free_port, serving
from patience import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

QUESTIONS = [
    "Tell me about the history of bread.",
    "How does a bicycle stay upright?",
    "Describe a day in the life of a lighthouse keeper.",
    "Why do leaves change colour?",
    "Explain how rain forms.",
    "What makes a good friend?",
]
ANSWER_TOKENS = 150


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("tier"), free_port()
    command = [sys.executable, "-m", "alise_scheduler", "serve", "--port", str(port)]
    command += ["--alise-state-dir", str(folder / "state"), "--alise-metrics-port", "0"]
    # 20 blocks of 32 tokens: for about three of the answers below.
    command += ["--max-num-seqs", "6", "--max-model-len", "512", "--num-gpu-blocks-override", "20"]
    command += ["--block-size", "32", "--alise-kv-host-gib", "0.02"]
    with serving(command, folder / "log", port) as server:
        yield server


def complete(server: Server, **options: Any) -> dict[str, Any]:
    body = {"model": DEFAULT_MODEL_NAME, "temperature": 0, **options}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=600.0)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_restored_jobs_answer_as_the_model_does(server: Server) -> None:
    """Each token of the pressed answers is, teacher-forced without pressure, (nearly) the best."""
    ask = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True, "return_token_ids": True}
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(lambda q: complete(server, prompt=q, **ask), QUESTIONS))
    assert server.metric("vllm:num_preemptions_total") > 0
    assert server.metric("alise_kv_tier_restored_tokens_total") > 0
    assert server.metric("alise_kv_tier_checksum_failures_total") == 0
    worse = total = 0
    for answer in answers:
        prompt, tokens = answer["prompt_token_ids"], answer["token_ids"]
        assert len(tokens) == ANSWER_TOKENS
        forced = complete(server, prompt=prompt + tokens, max_tokens=1, prompt_logprobs=1)
        for token, candidates in zip(tokens, forced["prompt_logprobs"][len(prompt) :], strict=True):
            best = max(entry["logprob"] for entry in candidates.values())
            total += 1
            worse += best - candidates[str(token)]["logprob"] > 0.1
    assert worse <= 0.01 * total


def test_nothing_is_held_when_all_is_answered(server: Server) -> None:
    def is_empty() -> bool:
        server.answer("Hi", max_tokens=2)
        return server.metric("alise_kv_tier_held_bytes") == 0

    eventually(is_empty)
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_the_engine_computes_on_as_many_cores_as_without_the_tier(server: Server) -> None:
    """On a CPU vLLM would set another core aside, and none on two: no comparison would be fair."""
    assert "reserve_cpu_num=1\n" in server.log.read_text()
