"""`alise operator`: reads the options, and runs the operator or prints what is generated."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from enum import Enum
from typing import Annotated

import kopf
import typer
from alise_scheduler.version import package_version

from alise_operator.api.crd import crd_yaml
from alise_operator.api.reference import reference_markdown
from alise_operator.images import DefaultImages
from alise_operator.process import run as run_operator
from alise_operator.settings import Settings
from alise_operator.watching import WatchesBrokeError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they show local variables, and so might show a token
    help="The Kubernetes operator: turns ALISEService objects into serving pods.",
)

_log = logging.getLogger(__name__)

_MAX_PRIORITY = 32767


class LogFormat(str, Enum):
    """How log lines are written."""

    JSON = "json"
    TEXT = "text"


@app.command()
def run(
    namespaces: Annotated[
        list[str] | None,
        typer.Option(
            "--namespace",
            envvar="ALISE_OPERATOR_NAMESPACES",
            help="A namespace to serve; may be repeated. Default: the whole cluster.",
        ),
    ] = None,
    engine_image: Annotated[
        str,
        typer.Option(envvar="ALISE_OPERATOR_ENGINE_IMAGE", help="Engine of services on GPUs."),
    ] = f"alise/engine:{package_version()}",
    engine_cpu_image: Annotated[
        str,
        typer.Option(envvar="ALISE_OPERATOR_ENGINE_CPU_IMAGE", help="Engine of those on CPUs."),
    ] = f"alise/engine-cpu:{package_version()}",
    predictor_image: Annotated[
        str,
        typer.Option(envvar="ALISE_OPERATOR_PREDICTOR_IMAGE", help="The scheduler sidecar."),
    ] = f"alise/sidecar:{package_version()}",
    peering: Annotated[
        str | None,
        typer.Option(
            envvar="ALISE_OPERATOR_PEERING",
            help="Name of the kopf peering object that guards against a second operator.",
        ),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(
            envvar="ALISE_OPERATOR_PRIORITY",
            min=0,
            max=_MAX_PRIORITY,
            help="Of two operators the one with the higher priority works. Default: random.",
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            envvar="ALISE_OPERATOR_PORT",
            min=0,
            max=65535,
            help="Port of /healthz, /readyz and /metrics.",
        ),
    ] = 8080,
    workers: Annotated[
        int,
        typer.Option(
            envvar="ALISE_OPERATOR_WORKERS", min=1, max=64, help="Services reconciled at once."
        ),
    ] = 4,
    audit_s: Annotated[
        float,
        typer.Option(
            envvar="ALISE_OPERATOR_AUDIT_S",
            min=1.0,
            max=86400.0,
            help="Seconds between looks for changes that no watch told of.",
        ),
    ] = 300.0,
    discovery_s: Annotated[
        float,
        typer.Option(
            envvar="ALISE_OPERATOR_DISCOVERY_S",
            min=0.5,
            max=3600.0,
            help="Seconds between looks for optional APIs that came or went.",
        ),
    ] = 30.0,
    log_format: Annotated[
        LogFormat, typer.Option(envvar="ALISE_OPERATOR_LOG_FORMAT", help="json or text.")
    ] = LogFormat.JSON,
    verbose: Annotated[
        bool, typer.Option("--verbose", envvar="ALISE_OPERATOR_VERBOSE", help="Log more.")
    ] = False,
) -> None:
    """Run the operator against the cluster of KUBECONFIG, or of the pod that it runs in."""
    style = kopf.LogFormat.JSON if log_format is LogFormat.JSON else kopf.LogFormat.FULL
    kopf.configure(verbose=verbose, log_format=style)
    for chatty in ("httpx2", "kopf.objects"):  # a line for each request, and for each event
        logging.getLogger(chatty).setLevel(logging.INFO if verbose else logging.WARNING)
    settings = Settings(
        images=DefaultImages(engine_image, engine_cpu_image, predictor_image),
        namespaces=tuple(namespaces or ()),
        peering=peering,
        priority=_priority() if priority is None else priority,
        identity=f"{os.environ.get('POD_NAME') or socket.gethostname()}-{os.getpid()}",
        port=port,
        workers=workers,
        discovery_s=discovery_s,
        audit_s=audit_s,
    )
    try:
        # Not `asyncio.run`, which waits for all tasks: those of watches that broke may never end.
        asyncio.new_event_loop().run_until_complete(run_operator(settings))
    except WatchesBrokeError as error:
        _log.error("the watches broke; Kubernetes starts this process again: %s", error)
        raise typer.Exit(1) from error


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition."""
    typer.echo(crd_yaml(), nl=False)


@app.command()
def reference() -> None:
    """Print the API reference (docs/api.md)."""
    typer.echo(reference_markdown(), nl=False)


def _priority() -> int:
    # Two operators of the same priority would both wait for the other: kopf's rule.
    return random.randint(1, _MAX_PRIORITY)  # noqa: S311 # no secret
