"""`alise simulate`: policies side by side on a modelled engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer
from alise_scheduler.engine_state import LengthPredictor
from alise_scheduler.replica import SimulatedRequest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from alise_bench.command_line import default_model_folder, fail
from alise_bench.dataset import Item
from alise_bench.errors import BenchError
from alise_bench.json_values import without_nan
from alise_bench.simulation.against import Recorded, compare_with_runs
from alise_bench.simulation.carried import load_carried
from alise_bench.simulation.compare import (
    SimulatedMetrics,
    median_metrics,
    metrics_of,
    simulate,
)
from alise_bench.simulation.cross_fitting import CrossFittedPredictor, cross_fitted
from alise_bench.simulation.predictors import saved_predictors
from alise_bench.simulation.profiles import Profile, load_profile, packaged_profiles
from alise_bench.simulation.systems import ALISE, FCFS, SYSTEMS, SimulatedSystem
from alise_bench.simulation.tables import (
    against_table,
    answers_table,
    carried_table,
    systems_table,
)
from alise_bench.simulation.what_if import parse_objective, replicas_needed
from alise_bench.simulation.workload import (
    RequestSource,
    items_of_dataset,
    load_trace_requests,
)

app = typer.Typer(add_completion=False)
console = Console()

_PARETO_SHARES: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
# Of the capacity: where --carry looks.
_LEAST_SHARE: Final = 0.05
_MOST_SHARE: Final = 20.0


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
    predictor: Annotated[
        Path | None,
        typer.Option(help="Instead: state folder of `alise predictor train`; needs --dataset."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Instead: models of --dataset itself, in so many parts, each of which is "
            "predicted by those that learned from the others. Minutes for 1,000 rows.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeats; medians are shown.")] = 1,
    what_if: Annotated[
        str, typer.Option(help="How many replicas meet this, such as 'jct_p99_s<=30'?")
    ] = "",
    most_replicas: Annotated[int, typer.Option(min=1, help="For --what-if.")] = 64,
    carry: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Which load has this mean normalized latency, s/token?"),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Folder of `alise bench`: simulate its runs, and say how far off. With their "
            "--dataset, with the models that they began with."
        ),
    ] = None,
    pareto: Annotated[bool, typer.Option(help="Draw mean against tail over gammas.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and pictures.")] = None,
) -> None:
    """Simulate policies on the requests of a trace, or of a data set at a rate."""
    try:
        chosen = _systems(systems)
        hardware = load_profile(profile)
        if against is not None:
            if predictor is not None or folds is not None:
                raise BenchError(
                    "--against takes the models of the runs, given their --dataset: "
                    "leave --predictor and --folds out"
                )
            comparisons = compare_with_runs(
                against, hardware, sigma, _recorded(dataset, model, hardware)
            )
            console.print(against_table(comparisons))
            _save(out, {c.run: asdict(c) for c in comparisons})
            return
        source = _source(trace, dataset, model, requests, hardware)
        trained = _trained(predictor, folds, source.items, model)
        setting = _Setting(hardware, replicas, sigma, trained)
        if carry is not None:
            rates = {
                system.name: _carried(system, source, setting, seeds, carry) for system in chosen
            }
            console.print(carried_table(rates, carry))
            _save(out, {"carry": carry, "requests_per_s": rates})
            return
        workloads = [
            source.draw(rate or load * replicas * source.capacity_per_s(seed), seed)
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
                replicas_needed(
                    system,
                    first,
                    hardware,
                    objective,
                    sigma=sigma,
                    predictor=setting.predictor,
                    most=most_replicas,
                )
                for system in chosen
            ]
            console.print(answers_table(answers, what_if, most_replicas))
            _save(out, {"what_if": what_if, "answers": [asdict(a) for a in answers]})
            return
        if pareto:
            _draw(out, _curves(workloads, setting), f"{hardware.name}, {mean_rate:.3g} requests/s")
            return
        results = {system.name: _run(system, workloads, setting) for system in chosen}
        console.print(systems_table(results))
        _save(out, {name: asdict(metrics) for name, metrics in results.items()})
    except BenchError as error:
        fail(error)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What all systems of a comparison share."""

    profile: Profile
    replicas: int
    sigma: float
    predictor: LengthPredictor | None


def _source(
    trace: Path | None, dataset: Path | None, model: Path | None, count: int, profile: Profile
) -> RequestSource:
    if (trace is None) == (dataset is None):
        raise BenchError("pass --trace (times and lengths) or --dataset (prompts and answers)")
    if trace is not None:
        return RequestSource((), load_trace_requests(trace), count, profile.hardware)
    assert dataset is not None
    items = items_of_dataset(dataset, model or default_model_folder(), profile.hardware)
    return RequestSource(items, (), count, profile.hardware)


def _recorded(dataset: Path | None, model: Path | None, profile: Profile) -> Recorded | None:
    if dataset is None:
        return None
    folder = model or default_model_folder()
    items = items_of_dataset(dataset, folder, profile.hardware)
    return Recorded({item.id: item for item in items}, folder)


def _trained(
    state_dir: Path | None, folds: int | None, items: Sequence[Item], model: Path | None
) -> LengthPredictor | None:
    if state_dir is None and folds is None:
        return None
    if state_dir is not None and folds is not None:
        raise BenchError("--predictor or --folds: one of them")
    if not items:
        raise BenchError("--predictor and --folds read prompts and answers: pass --dataset too")
    folder = model or default_model_folder()
    if folds is not None:
        return _cross_fitted(items, folds, folder)
    assert state_dir is not None
    (saved,) = saved_predictors([state_dir], folder)
    return saved


def _cross_fitted(items: Sequence[Item], folds: int, model: Path) -> CrossFittedPredictor:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        encoding = progress.add_task("encoding prompts", total=len(items))
        training = progress.add_task("training", total=folds)
        return cross_fitted(
            items,
            folds,
            model,
            lambda: progress.advance(encoding),
            lambda: progress.advance(training),
        )


def _carried(
    system: SimulatedSystem, source: RequestSource, setting: _Setting, seeds: int, latency_s: float
) -> float:
    capacity = setting.replicas * source.capacity_per_s(0)

    def latency_at(rate_per_s: float) -> float:
        workloads = [source.draw(rate_per_s, seed) for seed in range(seeds)]
        return _run(system, workloads, setting).normalized_latency_s

    return load_carried(latency_at, latency_s, _LEAST_SHARE * capacity, _MOST_SHARE * capacity)


def _systems(text: str) -> list[SimulatedSystem]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise BenchError(f"--systems: no {unknown[0]!r}; allowed: {', '.join(SYSTEMS)}")
    return [SYSTEMS[name] for name in names]


def _run(
    system: SimulatedSystem, workloads: Sequence[Sequence[SimulatedRequest]], setting: _Setting
) -> SimulatedMetrics:
    columns = (TextColumn(system.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runs = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for seed, requests in enumerate(workloads):
            task = progress.add_task(system.name, total=len(requests))
            outcomes = simulate(
                system,
                requests,
                setting.profile,
                sigma=setting.sigma,
                seed=seed,
                replicas=setting.replicas,
                predictor=setting.predictor,
                on_progress=lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
            )
            runs.append(metrics_of(outcomes))
    return median_metrics(runs)


def _curves(
    workloads: Sequence[Sequence[SimulatedRequest]], setting: _Setting
) -> dict[str, list[SimulatedMetrics]]:
    hardware = setting.profile.hardware
    served = hardware.step.step_s(0, hardware.slots, 0)
    tokens = [row.output_tokens for row in workloads[0]]
    usual = 1.0 / (served * sum(tokens) / len(tokens))
    curves = {"fcfs": [_run(FCFS, workloads, setting)]}
    for system in (ALISE, SYSTEMS["alise-oracle"], SYSTEMS["boost-attained"]):
        gammas = [replace(system, gamma_per_s=share * usual) for share in _PARETO_SHARES]
        curves[system.name] = [_run(steered, workloads, setting) for steered in gammas]
    for name in ("srtf", "srtf-aging", "shortest-first"):
        curves[name] = [_run(SYSTEMS[name], workloads, setting)]
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
        text = json.dumps(without_nan(report), indent=1, allow_nan=False)
        (out / "report.json").write_text(text + "\n", encoding="utf-8")
