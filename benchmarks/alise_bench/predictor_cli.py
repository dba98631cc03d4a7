"""`alise bench learning` and `alise bench ablation`: how the predictor learns, and from what."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_console = Console()

_File = Annotated[Path, typer.Argument(help="JSONL of prompts with answers.")]
_Model = Annotated[Path, typer.Option("--model", file_okay=False, help="Model folder.")]
_Seeds = Annotated[int, typer.Option(min=1, help="Random splits to average over.")]


def learning(
    file: _File,
    model: _Model,
    out: Annotated[Path, typer.Option(help="Folder for learning.png and learning.json.")],
    then: Annotated[Path | None, typer.Option(help="Data that come after a switch.")] = None,
    seeds: _Seeds = 3,
) -> None:
    """Draw how the predictor learns job by job, from nothing and after a switch of the data."""
    from alise_scheduler.predictor_cli import prepared

    from alise_bench.learning import RECOVERED_AFTER_JOBS, Curve, learning_curves, recovery
    from alise_bench.learning_picture import draw_learning

    curves: list[Curve] = []
    with ExitStack() as stack:
        first, table = stack.enter_context(prepared(file, model))
        second = stack.enter_context(prepared(then, model))[0] if then else []
        for seed in range(seeds):
            curves += learning_curves(first, second, table, seed)
            _console.print(f"seed {seed}: done", style="dim")
    out.mkdir(parents=True, exist_ok=True)
    picture = draw_learning(curves, file.stem, then.stem if then else "")
    picture.savefig(out / "learning.png", dpi=140, bbox_inches="tight")
    text = json.dumps([asdict(curve) for curve in curves], indent=1)
    (out / "learning.json").write_text(text, encoding="utf-8")
    if then:
        behind = recovery(curves)
        _console.print(f"{RECOVERED_AFTER_JOBS} jobs after the switch: {behind:+.3f} tau-b behind")


def ablation(file: _File, model: _Model, seeds: _Seeds = 3) -> None:
    """Score the predictor without each group of its features in turn."""
    from alise_scheduler.evaluation import PROGRESS_TOKENS
    from alise_scheduler.predictor_cli import prepared

    from alise_bench.ablation import ablation as figures_without

    table = Table(title=f"tau-b on {file.name}, {seeds} splits", title_justify="left")
    for name in ("without", "at arrival", *(f"left at {n} tokens" for n in PROGRESS_TOKENS)):
        table.add_column(name, justify="left" if name == "without" else "right")
    full: list[float] = []
    with prepared(file, model) as (conversations, tokens):
        for name, report in figures_without(conversations, tokens, seeds):
            _console.print(f"{name}: done", style="dim")
            if report is None:
                table.add_row(name, "no model")
                continue
            taus = [report.tau_b, *report.tau_b_remaining.values()]
            if not full:
                full = taus
                table.add_row("(nothing)", *(f"{tau:.3f}" for tau in taus))
                continue
            changes = zip(taus, full, strict=True)
            table.add_row(name, *(f"{tau:.3f} ({tau - base:+.3f})" for tau, base in changes))
    _console.print(table)
