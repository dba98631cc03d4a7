"""`alise serve` as its users run it: a real model on the CPU, real processes, real failures.

One server serves all tests, in order; each leaves it as it found it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from alise_engine.default_model import (
    DEFAULT_MODEL_NAME,
    ensure_default_model,
    has_fast_bfloat16,
)
from live_server import Server, free_port
from patience import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPTS = [
    "Name three fruits.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What is 2 + 2?",
    "List the days of the week.",
]
DTYPE = "auto" if has_fast_bfloat16() else "float32"  # as `alise serve` chooses
OPTIONS = ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16", "--dtype", DTYPE]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def stock_answers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What stock vLLM answers, one prompt at a time."""
    model = ensure_default_model()
    port = free_port()
    command = [sys.executable, "-m", "alise_engine.vllm_main", "serve", str(model), *OPTIONS]
    command += ["--served-model-name", DEFAULT_MODEL_NAME, "--port", str(port)]
    server = Server(command, tmp_path_factory.mktemp("stock") / "log", port)
    try:
        server.wait_until_ready()
        return [server.answer(prompt) for prompt in PROMPTS]
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(stock_answers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("alise"), free_port()
    command = [sys.executable, "-m", "alise_scheduler", "serve", "--port", str(port)]
    command += ["--alise-state-dir", str(folder / "state"), "--alise-metrics-port", "0"]
    # MLFQ ranks and preempts without waiting for a first model.
    command += ["--alise-policy", "mlfq"]
    # Even on a slow machine an answer under way is not cut off.
    command += ["--alise-drain-s", "300"]
    server = Server(command, folder / "log", port)
    try:
        server.wait_until_ready()
        eventually(server.is_connected)
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def test_tokens_are_stock_vllms(server: Server, stock_answers: list[str]) -> None:
    assert [server.answer(prompt) for prompt in PROMPTS] == stock_answers


def test_the_ready_line_is_a_command_that_works(server: Server) -> None:
    text = server.log.read_text(errors="replace")
    command = text[text.index("curl http") :].partition("}'")[0] + "}'"
    done = subprocess.run(
        ["bash", "-c", command.replace('"model"', '"max_tokens": 5, "model"')],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert '"finish_reason"' in done.stdout, done.stderr


def test_bad_input_gets_vllms_own_errors(server: Server) -> None:
    response = server.chat("Hi", max_tokens=-1)
    assert response.status_code == 400
    assert "max_tokens" in response.json()["error"]["message"]
    body = {"model": "no such model", "prompt": "x"}
    unknown = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60.0)
    assert unknown.status_code == 404


def test_a_client_that_leaves_frees_its_job(server: Server) -> None:
    body = {"model": DEFAULT_MODEL_NAME, "prompt": "Once", "max_tokens": 1500, "stream": True}
    body["ignore_eos"] = True
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300.0) as stream:
        next(stream.iter_lines())
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)
    server.answer("Hi", max_tokens=2)
    eventually(lambda: server.metric("alise_engine_live_jobs") == 0)


def answers_while(server: Server, harm: Callable[[], None], count: int = 24) -> None:
    """Ask `count` at once, do `harm` amid them, and see all answered."""
    with ThreadPoolExecutor(count) as pool:
        asked = [
            pool.submit(server.chat, PROMPTS[i % len(PROMPTS)], max_tokens=40) for i in range(count)
        ]
        time.sleep(0.5)
        harm()
        assert {future.result().status_code for future in asked} == {200}


def test_a_killed_sidecar_is_restarted(server: Server, stock_answers: list[str]) -> None:
    old = server.sidecar()
    answers_while(server, old.kill)
    assert server.answer(PROMPTS[0]) == stock_answers[0]
    server.wait_for_a_sidecar_after(old)
    eventually(server.is_connected)
    log = server.log.read_text(errors="replace")
    assert "The scheduler sidecar ended" in log
    assert "jobs are ordered by arrival" in log


def test_a_hung_sidecar_delays_nobody(server: Server, stock_answers: list[str]) -> None:
    sidecar = server.sidecar()
    sidecar.suspend()
    try:
        answers_while(server, lambda: None)
        assert server.answer(PROMPTS[1]) == stock_answers[1]
        eventually(lambda: not server.is_connected())
    finally:
        sidecar.resume()
    eventually(server.is_connected)


def test_a_deleted_socket_is_made_again(server: Server) -> None:
    sidecar = server.sidecar()
    arguments = sidecar.cmdline()
    path = Path(arguments[arguments.index("--listen") + 1].removeprefix("unix://"))
    path.unlink()
    answers_while(server, sidecar.kill)
    server.wait_for_a_sidecar_after(sidecar)
    eventually(server.is_connected)
    assert path.exists()


def test_a_thousand_requests_at_once(server: Server) -> None:
    url = f"{server.url}/v1/completions"
    # Each on a connection of its own: reusing one that the server is just closing is an error. A
    # pool told to keep none idle may reuse one that just became idle; the header forbids it.
    limits, alone = httpx.Limits(max_connections=None), {"Connection": "close"}
    with (
        httpx.Client(timeout=600.0, limits=limits, headers=alone) as client,
        ThreadPoolExecutor(1000) as pool,
    ):
        bodies = [
            {"model": DEFAULT_MODEL_NAME, "prompt": f"Hi {i}", "max_tokens": 1 + i % 4}
            for i in range(1000)
        ]
        asked = [pool.submit(client.post, url, json=body) for body in bodies]
        assert {future.result().status_code for future in asked} == {200}
    eventually(lambda: server.metric("vllm:num_requests_waiting") == 0)


def test_sigterm_drains(server: Server) -> None:
    body = {"model": DEFAULT_MODEL_NAME, "prompt": "Once", "max_tokens": 400}
    body["ignore_eos"] = True
    url = f"{server.url}/v1/completions"
    client = partial(httpx.Client, base_url=server.url, timeout=60.0)
    with client() as kept, client() as probe:
        kept.get("/v1/models")  # its connection is kept alive from here on
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=300.0) as stream:
            assert stream.status_code == 200, stream.read()
            lines = stream.iter_lines()
            pieces = [next(lines)]  # it is being answered
            os.kill(server.process.pid, signal.SIGTERM)
            eventually(lambda: probe.get("/health").status_code == 503)
            for _ in range(3):
                answer = kept.post("/v1/completions", json=body)
                assert answer.status_code == 503
                assert answer.headers["connection"] == "close"
                assert answer.headers["retry-after"] == "1"
            pieces += [line for line in lines if line.startswith("data: ")]
    assert len(pieces) > 100
    assert pieces[-1] == "data: [DONE]"
    assert server.process.wait(300.0) == 0
    with pytest.raises(psutil.NoSuchProcess):
        server.sidecar()
