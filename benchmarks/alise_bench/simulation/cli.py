"""`alise simulate`: policies side by side on a modelled engine."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from alise_scheduler.replica import SimulatedRequest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from alise_bench.errors import BenchError
from alise_bench.simulation.against import Comparison, compare_with_runs
from alise_bench.simulation.compare import (
    SimulatedMetrics,
    median_metrics,
    metrics_of,
    simulate,
)
from alise_bench.simulation.profiles import Profile, load_profile, packaged_profiles
from alise_bench.simulation.systems import ALISE, FCFS, SYSTEMS, SimulatedSystem
from alise_bench.simulation.what_if import Answer, parse_objective, replicas_needed
from alise_bench.simulation.workload import (
    capacity_per_s,
    lengths_of_dataset,
    load_trace_requests,
    poisson_requests,
    stretched,
)

app = typer.Typer(add_completion=False)
console = Console()

_PARETO_SHARES: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
_COLUMNS: Final = {
    "normalized_latency_s": "mean norm. latency s/token",
    "jct_s": "mean JCT s",
    "jct_p99_s": "p99 JCT s",
    "ttft_p99_s": "p99 TTFT s",
    "longest_gap_p99_s": "p99 longest gap s",
    "preemptions": "preemptions",
}


@app.command()
def simulate_command(
    profile: Annotated[
        str,
        typer.Option(help=f"What a replica can do: {', '.join(packaged_profiles())}, or a file."),
    ] = "smollm2-cpu",
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests with times and lengths: Azure's CSV, or JSONL."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="JSONL of prompts and answers (docs/benchmark.md).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Whose tokens count; default: the embedded small model.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Requests per second; a trace is stretched.")
    ] = None,
    load: Annotated[
        float, typer.Option(min=0.01, help="Else: this share of one replica's capacity.")
    ] = 0.9,
    requests: Annotated[int, typer.Option(min=2, help="How many at most.")] = 1000,
    replicas: Annotated[int, typer.Option(min=1, help="Each takes every n-th request.")] = 1,
    systems: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SYSTEMS)}.")] = (
        "fcfs,alise,alise-oracle,boost-attained,srtf,srtf-aging,mlfq,shortest-first"
    ),
    sigma: Annotated[
        float, typer.Option(min=0.0, help="Error of the predictor: of the length's logarithm.")
    ] = 0.8,
    seeds: Annotated[int, typer.Option(min=1, help="Repeats; medians are shown.")] = 1,
    what_if: Annotated[
        str, typer.Option(help="How many replicas meet this, such as 'jct_p99_s<=30'?")
    ] = "",
    most_replicas: Annotated[int, typer.Option(min=1, help="For --what-if.")] = 64,
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of `alise bench`: simulate its runs, and say how far off."),
    ] = None,
    pareto: Annotated[bool, typer.Option(help="Draw mean against tail over gammas.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and pictures.")] = None,
) -> None:
    """Simulate policies on the requests of a trace, or of a data set at a rate."""
    try:
        chosen = _systems(systems)
        hardware = load_profile(profile)
        if against is not None:
            comparisons = compare_with_runs(against, hardware, sigma)
            console.print(_against_table(comparisons))
            _save(out, {c.run: asdict(c) for c in comparisons})
            return
        workloads = [
            _requests(trace, dataset, model, rate, load * replicas, requests, hardware, seed)
            for seed in range(seeds)
        ]
        first = workloads[0]
        mean_rate = (len(first) - 1) / max(first[-1].arrival_s, 1e-9)
        console.print(
            f"{len(first)} requests at {mean_rate:.3g}/s, {replicas} replica(s) of "
            f"{hardware.name}: {hardware.source}",
            style="dim",
            highlight=False,
        )
        if what_if:
            objective = parse_objective(what_if)
            answers = [
                replicas_needed(system, first, hardware, objective, sigma=sigma, most=most_replicas)
                for system in chosen
            ]
            console.print(_answers_table(answers, what_if, most_replicas))
            _save(out, {"what_if": what_if, "answers": [asdict(a) for a in answers]})
            return
        if pareto:
            curves = _curves(workloads, hardware, sigma, replicas)
            _draw(out, curves, f"{hardware.name}, {mean_rate:.3g} requests/s")
            return
        results = {
            system.name: _run(system, workloads, hardware, sigma, replicas) for system in chosen
        }
        console.print(_table(results))
        _save(out, {name: asdict(metrics) for name, metrics in results.items()})
    except BenchError as error:
        _fail(error)


def _systems(text: str) -> list[SimulatedSystem]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise BenchError(f"--systems: no {unknown[0]!r}; allowed: {', '.join(SYSTEMS)}")
    return [SYSTEMS[name] for name in names]


def _requests(
    trace: Path | None,
    dataset: Path | None,
    model: Path | None,
    rate: float | None,
    load: float,
    count: int,
    profile: Profile,
    seed: int,
) -> tuple[SimulatedRequest, ...]:
    if (trace is None) == (dataset is None):
        raise BenchError("pass --trace (times and lengths) or --dataset (prompts and answers)")
    if trace is not None:
        rows = load_trace_requests(trace)
        start = seed * count % max(len(rows) - count, 1)
        window = rows[start : start + count]
        lengths = [(row.prompt_tokens, row.output_tokens) for row in window]
        wanted = rate or load * capacity_per_s(lengths, profile.hardware)
        shifted = [replace(row, arrival_s=row.arrival_s - window[0].arrival_s) for row in window]
        return stretched(shifted, wanted)
    assert dataset is not None
    lengths = list(lengths_of_dataset(dataset, _model(model), profile.hardware))
    wanted = rate or load * capacity_per_s(lengths, profile.hardware)
    return poisson_requests(lengths, wanted, count, seed)


def _model(model: Path | None) -> Path:
    if model is not None:
        return model
    from alise_engine.default_model import DefaultModelMissingError, ensure_default_model

    try:
        return ensure_default_model()
    except DefaultModelMissingError as error:
        raise BenchError(str(error)) from error


def _run(
    system: SimulatedSystem,
    workloads: list[tuple[SimulatedRequest, ...]],
    profile: Profile,
    sigma: float,
    replicas: int,
) -> SimulatedMetrics:
    columns = (TextColumn(system.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for seed, requests in enumerate(workloads):
            task = progress.add_task(system.name, total=len(requests))
            outcomes = simulate(
                system,
                requests,
                profile,
                sigma=sigma,
                seed=seed,
                replicas=replicas,
                on_progress=lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
            )
            runs.append(metrics_of(outcomes))
    return median_metrics(runs)


def _curves(
    workloads: list[tuple[SimulatedRequest, ...]], profile: Profile, sigma: float, replicas: int
) -> dict[str, list[SimulatedMetrics]]:
    def run(system: SimulatedSystem) -> SimulatedMetrics:
        return _run(system, workloads, profile, sigma, replicas)

    served = profile.hardware.step.step_s(0, profile.hardware.slots, 0)
    tokens = [row.output_tokens for row in workloads[0]]
    usual = 1.0 / (served * sum(tokens) / len(tokens))
    curves = {"fcfs": [run(FCFS)]}
    for system in (ALISE, SYSTEMS["alise-oracle"], SYSTEMS["boost-attained"]):
        gammas = [replace(system, gamma_per_s=share * usual) for share in _PARETO_SHARES]
        curves[system.name] = [run(steered) for steered in gammas]
    for name in ("srtf", "srtf-aging", "shortest-first"):
        curves[name] = [run(SYSTEMS[name])]
    return curves


def _draw(out: Path | None, curves: dict[str, list[SimulatedMetrics]], title: str) -> None:
    from alise_bench.simulation.pictures import pareto

    if out is None:
        raise BenchError("--pareto draws into a folder: pass --out too")
    out.mkdir(parents=True, exist_ok=True)
    pareto(curves, title).savefig(out / "pareto.png", dpi=140, bbox_inches="tight")
    _save(out, {name: [asdict(point) for point in points] for name, points in curves.items()})
    console.print(f"written: {out}/pareto.png")


def _save(out: Path | None, report: dict[str, object]) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _table(results: dict[str, SimulatedMetrics]) -> Table:
    table = Table(title="simulated (x the first system's)", title_justify="left")
    table.add_column("system")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right")
    base = asdict(next(iter(results.values())))
    for name, metrics in results.items():
        row = asdict(metrics)
        table.add_row(name, *(_cell(row[column], base[column]) for column in _COLUMNS))
    return table


def _cell(value: float, base: float) -> str:
    if not base or math.isnan(value):
        return f"{value:,.0f}"
    return f"{value:,.3g} ({value / base:.2f}x)"


def _answers_table(answers: list[Answer], objective: str, most: int) -> Table:
    table = Table(title=f"replicas for {objective}", title_justify="left")
    for title in ("system", "replicas", "p99 JCT s", "mean norm. latency s/token"):
        table.add_column(title, justify="right")
    for answer in answers:
        table.add_row(
            answer.system,
            f"more than {most}" if answer.replicas is None else str(answer.replicas),
            f"{answer.metrics.jct_p99_s:.3g}",
            f"{answer.metrics.normalized_latency_s:.3g}",
        )
    return table


def _against_table(comparisons: list[Comparison]) -> Table:
    table = Table(title="simulated (x the real run's)", title_justify="left")
    for title in ("run", "mean norm. latency s/token", "mean JCT s", "p99 JCT s"):
        table.add_column(title, justify="right")
    for comparison in comparisons:
        real, simulated = asdict(comparison.real), asdict(comparison.simulated)
        columns = ("normalized_latency_s", "jct_s", "jct_p99_s")
        table.add_row(comparison.run, *(_cell(simulated[c], real[c]) for c in columns))
    return table


def _fail(error: BenchError) -> NoReturn:
    Console(stderr=True).print(
        f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    raise typer.Exit(1)
