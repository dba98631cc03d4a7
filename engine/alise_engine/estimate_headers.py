"""Estimates for clients that ask: `x-alise-*` headers on the answers of vLLM's API server.

An ASGI middleware, put in by vLLM's own `--middleware`. A request without `x-alise-estimate: 1`
goes through untouched. For one with it, the prompt is tokenized by the server's own `/tokenize`
and the sidecar is asked (`Predict`) while vLLM already works on the request; the headers wait for
that at most `PATIENCE_S`, and whatever goes wrong, the answer goes out without them.

It runs in the API server's process, which has no part in scheduling: it knows nothing of the job
that the request becomes, and asks for one like it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias, cast

import grpc
import httpx
from alise_scheduler import protocol
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc as pb_grpc

from alise_engine.channel import CHANNEL_OPTIONS, credentials
from alise_engine.settings import EngineSettings

PATIENCE_S = 0.25
MAX_BODY_BYTES = 4 * 1024 * 1024
_PATHS = ("/v1/chat/completions", "/v1/completions")
_ASKED = (b"1", b"true")
# What decides which tokens a chat becomes.
_CHAT_FIELDS = (
    "model",
    "messages",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
)

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

logger = logging.getLogger("vllm.alise.estimates")


class EstimateHeaders:
    """The middleware; reads the sidecar's address where the scheduler plug-in does."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._settings = EngineSettings.from_env(os.environ)
        self._stub: pb_grpc.SchedulerAsyncStub | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if not _wants_estimate(scope) or self._settings.address is None:
            await self._app(scope, receive, send)
            return
        deadline_s = time.monotonic() + PATIENCE_S
        messages = await _request_messages(receive)
        body = b"".join(message.get("body", b"") for message in messages)
        asking = asyncio.create_task(self._headers(scope, body))

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and 200 <= message["status"] < 300:
                left_s = max(deadline_s - time.monotonic(), 0.0)
                await asyncio.wait({asking}, timeout=left_s)
                if asking.done():
                    message = {**message, "headers": [*message["headers"], *asking.result()]}
            await send(message)

        try:
            await self._app(scope, replay, send_with_headers)
        finally:
            asking.cancel()

    async def _headers(self, scope: MutableMapping[str, Any], body: bytes) -> Headers:
        try:
            prompt = await self._prompt(scope, body)
            if prompt is None:
                return []
            request = pb.PredictRequest(prompts=[prompt], with_times=True)
            response = await self._sidecar().Predict(request, timeout=PATIENCE_S)
            return _headers_of(response)
        except Exception as error:  # an estimate is never worth an answer
            logger.debug("no estimate for a client: %s", type(error).__name__)
            return []

    async def _prompt(self, scope: MutableMapping[str, Any], body: bytes) -> pb.Prompt | None:
        if len(body) > MAX_BODY_BYTES:
            return None
        asked = json.loads(body)
        prompt = asked.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            token_ids = prompt
        elif "messages" in asked:
            fields = {name: asked[name] for name in _CHAT_FIELDS if asked.get(name) is not None}
            token_ids = await self._tokenize(scope, fields)
        elif isinstance(prompt, str):
            fields = {name: asked[name] for name in ("model", "prompt") if name in asked}
            token_ids = await self._tokenize(scope, fields)
        else:
            return None  # several prompts have several lengths
        max_tokens = asked.get("max_completion_tokens") or asked.get("max_tokens") or 0
        temperature = asked.get("temperature")
        stop = asked.get("stop") or []
        return pb.Prompt(
            token_ids=protocol.bounded_token_ids(token_ids),
            prompt_tokens=len(token_ids),
            max_tokens=max_tokens,
            temperature=1.0 if temperature is None else temperature,
            stop_strings=1 if isinstance(stop, str) else len(stop),
        )

    async def _tokenize(self, scope: MutableMapping[str, Any], fields: dict[str, Any]) -> list[int]:
        async def same_app(inner: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            await self._app({**inner, "app": scope["app"]}, receive, send)

        transport = httpx.ASGITransport(app=same_app, root_path=scope.get("root_path", ""))
        # The base URL is never dialled: the server answers within this process.
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/tokenize", json=fields, timeout=PATIENCE_S)
            tokens: list[int] = answer.raise_for_status().json()["tokens"]
            return tokens

    def _sidecar(self) -> pb_grpc.SchedulerAsyncStub:
        if self._stub is None:  # not before there is an event loop
            address, tls = self._settings.address, credentials(self._settings.tls)
            if tls is None:
                channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            else:
                channel = grpc.aio.secure_channel(address, tls, options=CHANNEL_OPTIONS)
            self._stub = cast("pb_grpc.SchedulerAsyncStub", pb_grpc.SchedulerStub(channel))
        return self._stub


def _wants_estimate(scope: MutableMapping[str, Any]) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and scope["path"].removeprefix(scope.get("root_path", "")) in _PATHS
        and any(name == b"x-alise-estimate" and value in _ASKED for name, value in scope["headers"])
    )


async def _request_messages(receive: Receive) -> list[Message]:
    """Read the whole request, as vLLM would before it does anything."""
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _headers_of(response: pb.PredictResponse) -> Headers:
    prediction = response.predictions[0]
    quantiles = prediction.quantiles_tokens
    if not quantiles or not all(math.isfinite(tokens) for tokens in quantiles):
        return []  # no model yet
    _, _, p50, _, p90 = quantiles
    found = {
        "x-alise-predicted-tokens": f"{p50:.0f}",
        "x-alise-predicted-tokens-p90": f"{p90:.0f}",
        "x-alise-model-version": str(response.model_version),
    }
    if prediction.HasField("wait_s") and prediction.HasField("service_s"):
        found["x-alise-estimated-wait-s"] = f"{prediction.wait_s:.2f}"
        found["x-alise-estimated-finish-s"] = f"{prediction.wait_s + prediction.service_s:.2f}"
    return [(name.encode(), value.encode()) for name, value in found.items()]
