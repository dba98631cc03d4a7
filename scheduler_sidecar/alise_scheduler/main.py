"""The `alise` command: finds the subcommand, and imports nothing but that one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Final

import typer

from alise_scheduler.version import package_version


@dataclass(frozen=True, slots=True)
class Subcommand:
    """One subcommand, described without importing it."""

    name: str
    help: str
    target: str
    """module:attribute of a Typer application or a command."""
    extras: tuple[str, ...]
    """Any of these brings what it needs."""


SUBCOMMANDS: Final = (
    Subcommand(
        "serve",
        "Serve a model with speculative scheduling: the engine and its sidecar.",
        "alise_engine.cli:serve_command",
        ("cpu", "cuda"),
    ),
    Subcommand(
        "scheduler",
        "Run the scheduler sidecar alone.",
        "alise_scheduler.cli:app",
        ("sidecar",),
    ),
    Subcommand(
        "predictor",
        "Train or evaluate the length predictor on past traffic.",
        "alise_scheduler.predictor_cli:app",
        ("sidecar",),
    ),
    Subcommand(
        "top",
        "Show a running sidecar's queue, predictor and gain, in the terminal.",
        "alise_scheduler.top:app",
        ("sidecar",),
    ),
    Subcommand(
        "bench",
        "Compare with stock vLLM, side by side.",
        "alise_bench.cli:app",
        ("bench",),
    ),
    Subcommand(
        "simulate",
        "Compare policies on a modelled engine; say how many replicas a load needs.",
        "alise_bench.simulation.cli:app",
        ("bench",),
    ),
    Subcommand(
        "profile",
        "Measure a running engine, for `simulate`.",
        "alise_bench.simulation.measure:app",
        ("bench",),
    ),
    Subcommand(
        "operator",
        "Run the Kubernetes operator, or print its CRD.",
        "alise_operator.cli:app",
        ("operator",),
    ),
)

_root = typer.Typer(
    name="alise",
    no_args_is_help=True,
    add_completion=False,
    help="Serve large language models with a speculative scheduler.",
)


@_root.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"alise {package_version()}")
        raise typer.Exit


def _list(subcommand: Subcommand) -> None:
    # For --help and for the message about a mistyped name: `main` runs the real one before Typer.
    @_root.command(subcommand.name, help=subcommand.help)
    def listed() -> None:
        """Stand in for the subcommand."""


for _subcommand in SUBCOMMANDS:
    _list(_subcommand)


def main() -> None:
    """Run `alise`."""
    arguments = sys.argv[1:]
    for subcommand in SUBCOMMANDS:
        if arguments[:1] == [subcommand.name]:
            _load(subcommand)(args=arguments[1:], prog_name=f"alise {subcommand.name}")
            return
    _root(args=arguments, prog_name="alise")


def _load(subcommand: Subcommand):  # type: ignore[no-untyped-def]
    module, _, attribute = subcommand.target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("alise_"):
            raise
        wanted = " or ".join(repr(extra) for extra in subcommand.extras)
        typer.echo(
            f"alise {subcommand.name} needs the extra {wanted} ({error.name} is missing): "
            f"pip install 'alise[{subcommand.extras[0]}]'",
            err=True,
        )
        sys.exit(2)
