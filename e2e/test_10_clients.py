"""Ordinary clients, unchanged, through the Service: OpenAI's library and vLLM's own benchmark."""

from __future__ import annotations

from cluster import CLIENT, chat, kubectl, url

_TOKENIZER = "/opt/models/smollm2-135m-instruct"  # as the engine's image has it
_REQUESTS = 8


def test_a_stock_openai_client(smol: str) -> None:
    answers = chat(smol, "--requests", "4", "--concurrency", "2")
    assert [each for each in answers if "error" in each] == []
    assert all(each["text"] for each in answers)


def test_vllms_own_benchmark(smol: str) -> None:
    options = {
        "backend": "openai-chat",
        "base-url": url(smol).removesuffix("/v1"),
        "endpoint": "/v1/chat/completions",
        "model": "smollm2-135m-instruct",
        "tokenizer": _TOKENIZER,
        "dataset-name": "random",
        "num-prompts": str(_REQUESTS),
        "random-input-len": "32",
        "random-output-len": "16",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    # `vllm`, but for the name of the distribution that it asks for its version.
    command = ("python3", "-m", "alise_engine.vllm_main", "bench", "serve", *arguments)
    said = kubectl("exec", CLIENT, "--", *command, wait_s=300)
    (line,) = [each for each in said.splitlines() if each.startswith("Successful requests")]
    assert int(line.split()[-1]) == _REQUESTS
