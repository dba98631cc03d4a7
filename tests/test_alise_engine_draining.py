"""New requests during a drain, without a server: an ASGI application behind the middleware."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from alise_engine.draining import DRAIN_FILE, Draining
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route


class Served:
    """An application with one answer that streams until `may_end`; `client` asks it."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()
        routes = [Route("/stream", self._stream), *(Route(p, _ok) for p in ("/health", "/metrics"))]
        transport = httpx.ASGITransport(app=Draining(Starlette(routes=routes)))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def _stream(self, _: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            self.has_begun.set()
            yield "a"
            await self.may_end.wait()
            yield "b"

        return StreamingResponse(pieces())


async def _ok(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


@pytest.fixture
def drain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "draining"
    monkeypatch.setenv(DRAIN_FILE, str(path))
    return path


def test_only_new_requests_are_turned_away(drain_file: Path) -> None:
    async def scenario() -> None:
        served = Served()
        async with served.client as client:
            assert (await client.get("/health")).status_code == 200
            streaming = asyncio.create_task(client.get("/stream"))
            await served.has_begun.wait()
            drain_file.touch()
            for path in ("/health", "/stream"):
                answer = await client.get(path)
                assert answer.status_code == 503
                assert answer.headers["connection"] == "close"
                assert answer.headers["retry-after"] == "1"
                assert "shutting down" in answer.json()["error"]["message"]
            assert (await client.get("/metrics")).status_code == 200
            served.may_end.set()
            assert (await streaming).text == "ab"

    asyncio.run(scenario())


def test_without_a_launcher_all_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DRAIN_FILE, raising=False)

    async def scenario() -> None:
        async with Served().client as client:
            assert (await client.get("/health")).status_code == 200

    asyncio.run(scenario())
