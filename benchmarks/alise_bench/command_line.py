"""What the bench's commands share: how they fail, and the model they take when told none."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from alise_bench.errors import BenchError


def fail(error: Exception) -> NoReturn:
    """Print the error to stderr and end with status 1."""
    Console(stderr=True).print(
        f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    raise typer.Exit(1)


def default_model_folder() -> Path:
    """Return the folder of the embedded small model. Raises `BenchError`."""
    from alise_engine.default_model import DefaultModelMissingError, ensure_default_model

    try:
        return ensure_default_model()
    except DefaultModelMissingError as error:
        raise BenchError(str(error)) from error
