"""The sidecar's HTTP page: Prometheus metrics, the status page, and the document behind it.

A WSGI application on threads, as prometheus_client's own server is: the library comes with the
metrics already, a page needs no more, and a reader who is slow, or a scrape, never holds the
event loop that the engines' streams live on. It can read, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from importlib.resources import files
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from alise_scheduler.status import Query, QueryError, Status
from alise_scheduler.status_source import BusyError

_log = logging.getLogger(__name__)

STATUS_PATH: Final = "/api/v1/status"
_PAGE: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
}
_MAX_QUERY_CHARS: Final = 1024
_IDLE_TIMEOUT_S: Final = 10.0
_SECURITY: Final = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    # With an ETag: kept, but asked for each time.
    ("Cache-Control", "no-cache"),
)

_StartResponse = Callable[[str, list[tuple[str, str]]], object]
_Application = Callable[[dict[str, Any], _StartResponse], Iterable[bytes]]


def application(registry: CollectorRegistry, status: Callable[[], Status]) -> _Application:
    """Return the WSGI application; `status` is called on the request's thread."""
    metrics = make_wsgi_app(registry)
    package = files("alise_scheduler") / "status_page"
    page = {path: (package.joinpath(n).read_bytes(), kind) for path, (n, kind) in _PAGE.items()}

    def answer(environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/") or "/"
        if path == "/metrics":
            body: Iterable[bytes] = metrics(environ, start_response)
            return body
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _error(start_response, "405 Method Not Allowed", "allowed is GET")
        if path in page:
            return _send(environ, start_response, *page[path])
        if path != STATUS_PATH:
            known = f"there are /, {STATUS_PATH} and /metrics"
            return _error(start_response, "404 Not Found", known)
        try:
            query = Query.of(_parameters(environ.get("QUERY_STRING", "")))
            document = status().document(query)
        except QueryError as error:
            return _error(start_response, "400 Bad Request", str(error))
        except BusyError:
            return _error(start_response, "503 Service Unavailable", "the sidecar is busy")
        text = json.dumps(document, separators=(",", ":"), allow_nan=False)
        return _send(environ, start_response, text.encode(), "application/json")

    return answer


class HttpPage:
    """Serves an application on threads of its own, until closed."""

    def __init__(self, address: str, port: int, app: _Application) -> None:
        """Listen; raises `OSError` if the address cannot be had."""
        family, *_ = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        kind = type("_Server", (_Server,), {"address_family": family})
        self._server = kind((address, port), _Handler)
        self._server.set_app(app)
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        """Stop listening; requests under way are let go."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        # Not WSGIServer's, which asks the resolver for the machine's name.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout: ClassVar[float] = _IDLE_TIMEOUT_S

    def log_message(self, *_: Any) -> None:
        """Stay silent: a scrape every few seconds is no news."""


def _parameters(query: str) -> dict[str, str]:
    if len(query) > _MAX_QUERY_CHARS:
        raise QueryError(f"the query has {len(query)} characters; allowed are {_MAX_QUERY_CHARS}")
    try:
        return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=8))
    except ValueError as error:
        raise QueryError("the query has more than 8 parameters") from error


def _send(
    environ: dict[str, Any], start_response: _StartResponse, body: bytes, kind: str
) -> Iterable[bytes]:
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    headers = [("ETag", tag), *_SECURITY]
    if environ.get("HTTP_IF_NONE_MATCH") == tag:
        start_response("304 Not Modified", headers)
        return []
    headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _error(start_response: _StartResponse, status: str, text: str) -> Iterable[bytes]:
    body = json.dumps({"error": text}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response(status, [*headers, *_SECURITY])
    return [body]
