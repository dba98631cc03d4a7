"""The operator's HTTP page: `/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from alise_operator.metrics import Metrics


@asynccontextmanager
async def endpoints(
    port: int, metrics: Metrics, is_healthy: Callable[[], bool], is_ready: Callable[[], bool]
) -> AsyncIterator[None]:
    """Serve inside the block, on the operator's own event loop: a stall shows as a timeout."""

    def probe(holds: Callable[[], bool]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(text="ok") if holds() else web.Response(status=503, text="no")

        return answer

    async def page(_: web.Request) -> web.Response:
        body = generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application()
    application.router.add_get("/healthz", probe(is_healthy))
    application.router.add_get("/readyz", probe(is_ready))
    application.router.add_get("/metrics", page)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield
    finally:
        await runner.cleanup()
