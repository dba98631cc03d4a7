"""A proxy between operator and API server: it records every request, and spoils some."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from aiohttp import web
from operator_cluster import free_port

_PATH = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/[^/]+"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>[^/]+))?$"
)
_VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request in the terms of RBAC."""

    verb: str
    group: str
    resource: str
    name: str | None


@dataclass(frozen=True, slots=True)
class Fault:
    """What to do to a request instead of passing it on, or before, or after."""

    status: int | None = None
    delay_s: float = 0.0
    is_lost: bool = False
    """Carried out, but the connection breaks before the answer."""


Faults = Callable[[Request], Fault | None]


@dataclass
class Proxy:
    """Runs in a thread of its own. `faults` may be replaced at any time."""

    target: str
    faults: Faults = lambda _: None
    requests: list[Request] = field(default_factory=list)
    spoiled: int = 0

    def __post_init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._streams: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._started.wait(30)
        return self

    def cut(self) -> None:
        """Break all connections to the API server, and so all watches."""
        for task in list(self._streams):
            self._loop.call_soon_threadsafe(task.cancel)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(30)

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(ssl=False, limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            application = web.Application(client_max_size=2**26)
            application.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self._started.set()
            await self._stopping.wait()
            for task in self._streams:
                task.cancel()
            await runner.cleanup()
            await asyncio.gather(*self._streams, return_exceptions=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            return await self._answer(request)
        finally:
            self._streams.discard(task)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        known = parsed(request.method, request.path, dict(request.query))
        fault = None
        if known is not None:
            self.requests.append(known)
            fault = self.faults(known)
        if fault is not None:
            self.spoiled += 1
            await asyncio.sleep(fault.delay_s)
            if fault.status is not None:
                return _failure(fault.status)
        return await self._pass_on(request, is_lost=fault is not None and fault.is_lost)

    async def _pass_on(self, request: web.Request, *, is_lost: bool) -> web.StreamResponse:
        dropped = {"host", "content-length", "transfer-encoding", "connection"}
        headers = {k: v for k, v in request.headers.items() if k.lower() not in dropped}
        async with self._session.request(
            request.method,
            self.target + str(request.rel_url),
            headers=headers,
            data=await request.read() or None,
            skip_auto_headers=("Content-Type",),
        ) as upstream:
            if is_lost:
                await upstream.read()
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            kept = {
                k: v
                for k, v in upstream.headers.items()
                if k.lower() not in {*dropped, "content-encoding"}
            }
            known = parsed(request.method, request.path, dict(request.query))
            if known is not None and known.verb == "patch" and upstream.status == 201:
                # An apply that makes the object needs both rights.
                self.requests.append(replace(known, verb="create"))
            answer = web.StreamResponse(status=upstream.status, headers=kept)
            try:
                await answer.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await answer.write(chunk)
            except ConnectionError:
                pass  # the operator has ended its watch
            return answer


def parsed(method: str, path: str, query: dict[str, str]) -> Request | None:
    """Return a request in the terms of RBAC, None for discovery."""
    match = _PATH.match(path)
    if match is None:
        return None
    found: dict[str, Any] = match.groupdict()
    resource = found["plural"]
    if found["subresource"]:
        resource = f"{resource}/{found['subresource']}"
    verb = _VERBS.get(method)
    if verb is None:
        verb = "get" if found["name"] else ("watch" if "watch" in query else "list")
    return Request(verb, found["group"] or "", resource, found["name"])


def _failure(status: int) -> web.Response:
    reasons = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError"}
    body = {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "reason": reasons.get(status, ""),
        "message": "injected by a test",
        "code": status,
    }
    headers = {"Retry-After": "1"} if status == 429 else {}
    return web.json_response(body, status=status, headers=headers)
