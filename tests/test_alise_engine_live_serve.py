"""What a running `alise serve` says of itself: the status document, and estimates for clients."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from alise_engine.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from alise_scheduler.shadow import MIN_JOBS
from live_server import Server, free_port, serving
from patience import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ASK = {"x-alise-estimate": "1"}


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture(scope="module")
def server(ports: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    past = folder / "traffic.jsonl"
    with past.open("w") as file:
        for index in range(100):
            words = 5 + 60 * (index % 2)
            asked = f"Say {'a few words' if words < 10 else 'a lot'} about number {index}."
            row = {
                "messages": [{"role": "user", "content": asked}],
                "response": "word " * (words + index % 5),
            }
            file.write(json.dumps(row) + "\n")
    train = [sys.executable, "-m", "alise_scheduler", "predictor", "train", str(past)]
    train += ["--model", str(ensure_default_model()), "--state-dir", str(folder / "state")]
    subprocess.run(train, check=True, capture_output=True, timeout=300)
    command = [sys.executable, "-m", "alise_scheduler", "serve", "--port", str(ports[0])]
    command += ["--alise-state-dir", str(folder / "state"), "--alise-estimate-headers"]
    command += ["--alise-metrics-port", str(ports[1])]
    with serving(command, folder / "log", ports[0]) as server:
        yield server


def body(prompt: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": DEFAULT_MODEL_NAME, "messages": messages, "max_tokens": 16, **options}


def test_who_asks_gets_headers_and_the_same_answer(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    asked = body("Say a lot about number 7.", temperature=0)

    def ask() -> httpx.Response:
        return httpx.post(url, json=asked, headers=ASK, timeout=600.0)

    answer = eventually(lambda: "x-alise-predicted-tokens" in (a := ask()).headers and a)
    assert 1 <= float(answer.headers["x-alise-predicted-tokens"]) <= 16
    assert float(answer.headers["x-alise-estimated-wait-s"]) >= 0
    finish_s = float(answer.headers["x-alise-estimated-finish-s"])
    assert 0 < finish_s < 600
    plain = httpx.post(url, json=asked, timeout=600.0)
    assert not [name for name in plain.headers if name.startswith("x-alise-")]
    assert answer.json()["choices"][0]["message"] == plain.json()["choices"][0]["message"]


def test_streams_stay_streams(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    asked = body("Say a few words about number 8.", stream=True)
    with httpx.stream("POST", url, json=asked, headers=ASK, timeout=600.0) as answer:
        pieces = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(pieces) > 3
    assert pieces[-1] == "data: [DONE]"


def test_the_status_is_the_engines(server: Server, ports: tuple[int, int]) -> None:
    def status() -> dict[str, Any]:
        page = httpx.get(f"http://127.0.0.1:{ports[1]}/api/v1/status", timeout=60.0)
        found: dict[str, Any] = page.json()
        return found

    before = status()["since_start"]["finished"]
    asked = itertools.count()
    has_seen = threading.Event()

    def ask() -> None:
        # Until the status was seen at work: on few cores the sidecar may get none for seconds.
        while not has_seen.is_set():
            server.answer(f"Tell me a story about {next(asked)}.", max_tokens=60)

    with ThreadPoolExecutor(20) as pool:
        asking = [pool.submit(ask) for _ in range(20)]
        try:
            busy = eventually(lambda: (s := status())["jobs"]["running"] > 2 and s)
        finally:
            has_seen.set()
        for each in asking:
            each.result()
    answers = next(asked)
    (engine,) = busy["engines"]
    assert engine["slots"] == 16
    assert engine["model"] == DEFAULT_MODEL_NAME
    assert all(row["prompt_tokens"] > 5 for row in busy["jobs"]["rows"])
    assert any(row["p50_tokens"] for row in busy["jobs"]["rows"])
    assert 0 <= max(row["age_s"] for row in busy["jobs"]["rows"]) < 120

    def is_all_told(now: dict[str, Any]) -> bool:
        # At least: `before` may lack the last answers of earlier tests, which are told by now.
        told = now["since_start"]["finished"] >= before + answers
        return told and now["jobs"]["running"] == 0

    after = eventually(lambda: is_all_told(s := status()) and s)
    # With what the engine has told, the shadow runs, and compares from `MIN_JOBS` jobs on.
    page = httpx.get(f"http://127.0.0.1:{ports[1]}/metrics", timeout=60.0).text
    assert "\nalise_shadow_jobs " in page
    if after["since_start"]["finished"] < MIN_JOBS:
        assert "alise_shadow_jobs 0.0" in page
