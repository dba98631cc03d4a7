"""What the launcher must understand of vLLM's own command line; the rest passes through unread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

DEFAULT_PORT = 8000
_HEALTH_TIMEOUT_S = 1.0


def option_value(arguments: Sequence[str], *names: str) -> str | None:
    """Return the value of the last `--name value` or `--name=value`; None without one.

    vLLM takes `_` for `-` in names, and so does this.
    """
    found = None
    for index, argument in enumerate(arguments):
        name, is_joined, value = argument.partition("=")
        if name.replace("_", "-") not in names:
            continue
        if is_joined:
            found = value
        elif index + 1 < len(arguments):
            found = arguments[index + 1]
    return found


def has_option(arguments: Sequence[str], *names: str) -> bool:
    """Say whether an option of one of these names is there."""
    return any(a.partition("=")[0].replace("_", "-") in names for a in arguments)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where vLLM's HTTP API listens."""

    scheme: str
    host: str
    port: int
    uds: str | None

    @classmethod
    def of(cls, arguments: Sequence[str]) -> ServerAddress:
        """Read it from vLLM's arguments."""
        host = option_value(arguments, "--host") or "localhost"
        port = option_value(arguments, "--port")
        return cls(
            scheme="https" if has_option(arguments, "--ssl-certfile") else "http",
            host="localhost" if host in ("0.0.0.0", "::") else host,  # noqa: S104 # not bound here
            port=int(port) if port and port.isdigit() else DEFAULT_PORT,
            uds=option_value(arguments, "--uds"),
        )

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"{self.scheme}://{self.host}:{self.port}"

    def is_healthy(self) -> bool:
        """Ask the server whether it is up."""
        # Only liveness of our own child is asked: its certificate may be anybody's.
        transport = httpx.HTTPTransport(uds=self.uds, verify=False)
        try:
            with httpx.Client(transport=transport, timeout=_HEALTH_TIMEOUT_S) as client:
                return client.get(f"{self.url}/health").is_success
        except httpx.HTTPError:
            return False

    def curl(self, model: str) -> str:
        """Return a request to paste into a shell."""
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
        )
        socket = f" --unix-socket {self.uds}" if self.uds else ""
        return (
            f"curl{socket} {self.url}/v1/chat/completions "
            f"-H 'Content-Type: application/json' \\\n  -d '{body}'"
        )
