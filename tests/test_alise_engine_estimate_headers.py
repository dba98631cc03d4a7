"""Headers with estimates, on a Starlette application in vLLM's place and a real sidecar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from alise_engine import estimate_headers
from alise_engine.estimate_headers import EstimateHeaders
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc
from patience import eventually
from scheduler_fakes import FakePredictor, progress
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from status_harness import STEP, sidecar_page

ASK = {"x-alise-estimate": "1"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


class FakeVllm:
    """Tokenizes to `token_ids`, and streams three pieces."""

    def __init__(self, token_ids: list[int] | None = None) -> None:
        self.token_ids = token_ids or [100] * 8
        self.tokenized: list[dict[str, Any]] = []
        self.served: list[dict[str, Any]] = []
        self.tokenize_s = 0.0
        self.status = 200

    async def tokenize(self, request: Request) -> Response:
        assert request.app is not None
        self.tokenized.append(await request.json())
        await asyncio.sleep(self.tokenize_s)
        return JSONResponse({"tokens": self.token_ids, "count": len(self.token_ids)})

    async def serve(self, request: Request) -> Response:
        self.served.append(await request.json())

        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b"one ", b"two ", b"three"):
                yield piece
                await asyncio.sleep(0.01)

        return StreamingResponse(pieces(), self.status)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/v1/chat/completions", self.serve, methods=["POST"]),
                Route("/v1/completions", self.serve, methods=["POST"]),
            ],
            middleware=[Middleware(EstimateHeaders)],
        )


def post(
    vllm: FakeVllm, body: Any, headers: dict[str, str], path: str = "/v1/chat/completions"
) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=vllm.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(asyncio.wait_for(post(), 120))


def alise(response: httpx.Response) -> dict[str, str]:
    return {k: v for k, v in response.headers.items() if k.startswith("x-alise-")}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_headers, "PATIENCE_S", 20.0)  # a busy machine


def test_who_asks_is_told_length_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    with sidecar_page(tmp_path, FakePredictor(5)) as engine:
        monkeypatch.setenv("ALISE_SCHEDULER", f"unix://{tmp_path}/s.sock")
        engine.connect(slots=1)
        engine.send(*[pb.Event(step=STEP)] * 40, engine.arrive("a", tokens=200), progress("a", 1))
        vllm = FakeVllm()

        def ask() -> httpx.Response:
            return post(vllm, {**CHAT, "tools": None, "max_tokens": 500}, ASK)

        answer = eventually(lambda: float(alise(a := ask())["x-alise-estimated-wait-s"]) > 2 and a)
        found = alise(answer)
        assert found["x-alise-predicted-tokens"] == "100"
        assert found["x-alise-predicted-tokens-p90"] == "200"
        assert found["x-alise-model-version"] == "5"
        # 200 tokens of the one that runs, then about 100 of its own, at 30 ms each.
        wait_s, finish_s = (
            float(found[f"x-alise-estimated-{name}-s"]) for name in ("wait", "finish")
        )
        assert 4 < wait_s < 12
        assert wait_s + 2 < finish_s < wait_s + 6
        assert answer.text == "one two three"
        assert vllm.served[-1]["max_tokens"] == 500
        assert vllm.tokenized[-1] == {"model": "tiny", "messages": CHAT["messages"]}


def test_who_does_not_ask_is_not_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALISE_SCHEDULER", f"unix://{tmp_path}/nobody.sock")
    vllm = FakeVllm()
    answer = post(vllm, CHAT, {})
    assert not alise(answer)
    assert answer.text == "one two three"
    assert not vllm.tokenized


@pytest.mark.parametrize(
    "body",
    [
        {"model": "tiny", "prompt": [100] * 4},
        {"model": "tiny", "prompt": "Once upon a time", "stop": ["a", "b"]},
    ],
    ids=["token ids", "text"],
)
def test_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: None, body: dict[str, Any]
) -> None:
    with sidecar_page(tmp_path) as engine:
        monkeypatch.setenv("ALISE_SCHEDULER", f"unix://{tmp_path}/s.sock")
        vllm = FakeVllm()
        found = alise(post(vllm, body, ASK, "/v1/completions"))
        assert found["x-alise-predicted-tokens"] == "100"
        assert "x-alise-estimated-wait-s" not in found  # there is no engine
        assert len(vllm.tokenized) == isinstance(body["prompt"], str)
        engine.connect(slots=2)
        eventually(
            lambda: (
                alise(post(vllm, body, ASK, "/v1/completions")).get("x-alise-estimated-wait-s")
                == "0.00"
            )
        )


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a", "b"]},
        {"prompt": [-1]},
        {"messages": [], "max_tokens": "x"},
        {"messages": "Hi", "stop": 3},
        ["no object"],
    ],
    ids=str,
)
def test_what_cannot_be_estimated_is_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: None, body: Any
) -> None:
    with sidecar_page(tmp_path):
        monkeypatch.setenv("ALISE_SCHEDULER", f"unix://{tmp_path}/s.sock")
        vllm = FakeVllm()
        answer = post(vllm, body, ASK, "/v1/completions")
        assert answer.text == "one two three"
        assert vllm.served == [body]
        assert not alise(answer)


def test_an_error_gets_no_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    with sidecar_page(tmp_path):
        monkeypatch.setenv("ALISE_SCHEDULER", f"unix://{tmp_path}/s.sock")
        vllm = FakeVllm()
        vllm.status = 400
        assert not alise(post(vllm, CHAT, ASK))


def test_without_a_sidecar_or_with_a_slow_one_the_answer_is_hardly_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALISE_SCHEDULER", f"unix://{tmp_path}/nobody.sock")
    vllm = FakeVllm()
    vllm.tokenize_s = 60.0
    began_s = time.monotonic()
    answer = post(vllm, CHAT, ASK)
    assert answer.text == "one two three"
    assert not alise(answer)
    assert time.monotonic() - began_s < 30.0  # and not the 60 of the tokenizer


def test_before_the_first_model_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    with sidecar_page(tmp_path, FakePredictor(model_version=0)):
        monkeypatch.setenv("ALISE_SCHEDULER", f"unix://{tmp_path}/s.sock")
        assert not alise(post(FakeVllm(), CHAT, ASK))


def test_the_estimates_are_of_bounded_number(tmp_path: Path) -> None:
    with sidecar_page(tmp_path), grpc.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        with pytest.raises(grpc.RpcError, match="17 prompts; allowed are 16"):
            stub.Predict(pb.PredictRequest(prompts=[pb.Prompt()] * 17, with_times=True))
