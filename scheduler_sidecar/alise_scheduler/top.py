"""`alise top`: what the sidecar is doing, in a terminal. Reads the status page's document."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live

from alise_scheduler.top_view import view

_TIMEOUT_S: Final = 10.0
_MAX_BYTES: Final = 4 * 1024 * 1024
_HEADER_LINES: Final = 8

app = typer.Typer(add_completion=False)


class UnreachableError(Exception):
    """There is no status to be had; the text says why."""


class Show(str, Enum):
    """Which jobs to list."""

    ALL = "all"
    RUNNING = "running"
    QUEUED = "queued"
    WAITING = "waiting"
    PREEMPTED = "preempted"


def fetch(url: str, parameters: dict[str, str]) -> dict[str, Any]:
    """Return the status document of the sidecar whose page is at `url`.

    Raises `UnreachableError`.
    """
    address = f"{url.rstrip('/')}/api/v1/status?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:  # noqa: S310 # checked
            document: dict[str, Any] = json.loads(answer.read(_MAX_BYTES))
            return document
    except urllib.error.HTTPError as error:
        try:
            text = json.loads(error.read(_MAX_BYTES))["error"]
        except (ValueError, KeyError, TypeError):
            text = "is that the sidecar's metrics port?"
        raise UnreachableError(f"status {error.code}: {text}") from error
    except urllib.error.URLError as error:
        raise UnreachableError(str(error.reason)) from error
    except (OSError, ValueError) as error:
        raise UnreachableError(str(error) or type(error).__name__) from error


def _checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url!r}: allowed are http://HOST:PORT and https://HOST:PORT.")
    return url


@app.command()
def top(
    url: Annotated[
        str,
        typer.Option(
            envvar="ALISE_STATUS_URL",
            callback=_checked_url,
            help="The sidecar's status page, which is on its metrics port.",
        ),
    ] = "http://127.0.0.1:9464",
    show: Annotated[Show, typer.Option(help="Jobs to list.")] = Show.ALL,
    search: Annotated[str, typer.Option(help="Part of a job's id.")] = "",
    limit: Annotated[
        int | None,
        typer.Option(min=0, max=500, help="Jobs to list at most; by default what fits."),
    ] = None,
    interval_s: Annotated[
        float, typer.Option(min=0.5, max=3600, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the document once, as JSON (docs/status.md).")
    ] = False,
) -> None:
    """Show the queue of a running scheduler sidecar, the predictor and the gain over FCFS."""
    console = Console()
    parameters = {"search": search} | ({} if show is Show.ALL else {"state": show.value})

    def look() -> dict[str, Any]:
        fitting = max(console.height - _HEADER_LINES, 1) if not (once or as_json) else 50
        return fetch(url, {**parameters, "limit": str(fitting if limit is None else limit)})

    try:
        status = look()
        if as_json:
            typer.echo(json.dumps(status, indent=2))
        elif once:
            console.print(view(status))
        else:
            _follow(console, look, status, interval_s)
    except UnreachableError as error:
        typer.echo(
            f"Error: no status from {url}: {error}. Name the sidecar's page with --url or "
            "ALISE_STATUS_URL; its port is the sidecar's --metrics-port "
            "(--alise-metrics-port of `alise serve`), and 0 there turns it off.",
            err=True,
        )
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        return


def _follow(
    console: Console, look: Callable[[], dict[str, Any]], status: dict[str, Any], interval_s: float
) -> None:
    with Live(view(status), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(view(look()), refresh=True)
