"""The benchmark's folder: its plan, and one raw file per finished run, so that it can go on.

Layout: `plan.json`, `runs/*.json` (raw per-request rows), `trained/` (the predictor of each
repeat), `logs/`, and what the report makes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alise_bench.errors import BenchError
from alise_bench.metrics import EngineCounts, RequestRow
from alise_bench.systems import System


@dataclass(frozen=True, slots=True)
class RunId:
    """One run: a system under one load, in one repeat."""

    system: System
    rate_per_s: float
    repeat: int

    @property
    def name(self) -> str:
        """Return the run's name in files."""
        return f"{self.system.value}-rate{self.rate_per_s:.4g}-repeat{self.repeat}"


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run, raw."""

    id: RunId
    rows: tuple[RequestRow, ...]
    counts: EngineCounts
    command: tuple[str, ...]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(path.suffix + ".part")
    staging.write_text(json.dumps(value, indent=1), encoding="utf-8")
    staging.replace(path)


def _run_file(folder: Path, run: RunId) -> Path:
    return folder / "runs" / f"{run.name}.json"


def trained_state(folder: Path, repeat: int) -> Path:
    """Return where the models that a repeat's runs begin with are kept."""
    return folder / "trained" / f"repeat{repeat}"


def has_run(folder: Path, run: RunId) -> bool:
    """Return whether `run` is finished."""
    return _run_file(folder, run).exists()


def save_run(folder: Path, run: Run) -> None:
    """Write a finished run."""
    rows = [asdict(row) for row in run.rows]
    value = {
        "system": run.id.system.value,
        "rate_per_s": run.id.rate_per_s,
        "repeat": run.id.repeat,
        "counts": asdict(run.counts),
        "command": run.command,
        "rows": rows,
    }
    write_json(_run_file(folder, run.id), value)


def load_runs(folder: Path) -> tuple[Run, ...]:
    """Read all finished runs of a benchmark. Raises `BenchError` if there are none."""
    files = sorted((folder / "runs").glob("*.json"))
    if not files:
        raise BenchError(f"{folder} holds no finished runs (runs/*.json)")
    return tuple(_load_run(file) for file in files)


def _load_run(file: Path) -> Run:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        rows = tuple(
            RequestRow(**{**row, "token_s": tuple(row["token_s"])}) for row in value["rows"]
        )
        run = RunId(System(value["system"]), float(value["rate_per_s"]), int(value["repeat"]))
        return Run(run, rows, EngineCounts(**value["counts"]), tuple(value["command"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{file} is not a run's file: {error!r}") from error


def open_plan(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the plan kept in `folder`, begun with `settings` if there is none.

    A plan is `{"settings": ..., ...measured}`. Raises `BenchError` if the folder holds a
    benchmark with other settings: its runs must not be mixed with these.
    """
    file = folder / "plan.json"
    if not file.exists():
        plan = {"settings": settings}
        write_json(file, plan)
        return plan
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    differ = sorted(k for k in settings if kept["settings"].get(k) != settings[k])
    if differ:
        names = ", ".join(f"{k} ({kept['settings'].get(k)} there)" for k in differ)
        raise BenchError(
            f"--out {folder} holds a benchmark with other settings: {names}; name another folder"
        )
    return kept


def save_plan(folder: Path, plan: dict[str, Any], **measured: Any) -> None:
    """Add measured values to the plan, on disk too."""
    plan.update(measured)
    write_json(folder / "plan.json", plan)


def load_plan(folder: Path) -> dict[str, Any]:
    """Return the plan of a benchmark. Raises `BenchError` if `folder` is not one's."""
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{folder} is not a benchmark's folder: {error}") from error
    return plan


def schedule_of_runs(
    systems: Sequence[System], rates_per_s: Sequence[float], repeats: int
) -> list[RunId]:
    """Return all runs, interleaved: each repeat goes through all systems, in turned order.

    The order is turned so that no system always runs first or after the same other one.
    """
    return [
        RunId(systems[(place + repeat) % len(systems)], rate, repeat)
        for repeat in range(repeats)
        for rate in rates_per_s
        for place in range(len(systems))
    ]
