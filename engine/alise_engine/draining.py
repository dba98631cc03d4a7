"""While a server drains, new requests get 503 at once; those under way go on to their end.

An ASGI middleware, put in by vLLM's own `--middleware`. vLLM itself goes on taking requests, on
connections that are kept alive, and fails them until its last answer has ended. The launcher says
by a file that the drain has begun: one look at it for each request. This module does not know how
long a drain takes, nor what a request asks for.
"""

from __future__ import annotations

import os
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

DRAIN_FILE = "ALISE_DRAIN_FILE"
"""Environment variable with the path of the file that is there once the drain has begun."""
_METRICS_PATH = "/metrics"  # the last answers count, too


class Draining:
    """The middleware; without the variable it lets all through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        path = os.environ.get(DRAIN_FILE)
        self._file = Path(path) if path else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or turn it away."""
        if scope["type"] == "http" and self._is_begun() and not _is_for_metrics(scope):
            await _turned_away()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_begun(self) -> bool:
        return self._file is not None and self._file.exists()


def _is_for_metrics(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/") == _METRICS_PATH


def _turned_away() -> JSONResponse:
    error = {
        "message": "This server is shutting down: ask again, another one will answer",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    return JSONResponse(
        {"error": error}, status_code=503, headers={"connection": "close", "retry-after": "1"}
    )
