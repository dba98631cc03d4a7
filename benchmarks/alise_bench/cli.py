"""`alise bench`: run the benchmark, make its report again, measure the scheduler's own cost."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from alise_bench import predictor_cli
from alise_bench.command_line import default_model_folder, fail
from alise_bench.errors import BenchError
from alise_bench.settings import BenchSettings, Mode
from alise_bench.systems import System

if TYPE_CHECKING:
    from alise_bench.overhead import Overhead

_ALL_SYSTEMS: Final = ",".join(system.value for system in System)
_DEFAULT_SYSTEMS: Final = "fcfs,priority-oracle,alise,alise-oracle"


class _RunByDefault(TyperGroup):
    """`alise bench [OPTIONS]` is `alise bench run [OPTIONS]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


app = typer.Typer(
    cls=_RunByDefault,
    help="Compare ALISE with stock vLLM: same machine, same requests, same arrivals. "
    "Without a command: `run`.",
    add_completion=False,
)
console = Console()


def _systems(text: str) -> tuple[System, ...]:
    try:
        return tuple(System(name.strip()) for name in text.split(","))
    except ValueError as error:
        raise BenchError(f"--systems {text}: {error}; allowed: {_ALL_SYSTEMS}") from error


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(rate) for rate in text.split(",")) if text else ()
    except ValueError as error:
        raise BenchError(f"--rates {text}: numbers separated by commas are needed") from error


def _model(model: Path | None) -> Path:
    if model is not None:
        if not (model / "config.json").is_file():
            raise BenchError(f"--model {model}: a folder with a model (config.json) is needed")
        return model.resolve()
    return default_model_folder().resolve()


@app.command()
def run(
    model: Annotated[
        Path | None, typer.Option(help="Model folder; default: the embedded small model.")
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(help="recorded: answers of the data set, replayed. natural: the model's own."),
    ] = Mode.NATURAL,
    dataset: Annotated[
        Path | None,
        typer.Option(help="JSONL of prompts (docs/benchmark.md); default: the packaged prompts."),
    ] = None,
    systems: Annotated[
        str, typer.Option(help=f"Comma-separated, of {_ALL_SYSTEMS}.")
    ] = _DEFAULT_SYSTEMS,
    requests: Annotated[int, typer.Option(min=2, help="Requests of a run.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats, each with other prompts.")] = 1,
    rates: Annotated[
        str, typer.Option(help="Requests per second, comma-separated: one load each.")
    ] = "",
    auto_load: Annotated[
        float | None,
        typer.Option(help="Search the rate where FCFS's latency is this multiple of unloaded."),
    ] = None,
    load_share: Annotated[
        float, typer.Option(min=0.01, help="Else: this share of the measured capacity.")
    ] = 1.2,
    trace: Annotated[
        Path | None, typer.Option(help="Arrival times (CSV or JSONL) instead of Poisson.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for raw rows and report; an interrupted run goes on.")
    ] = Path("benchmarks/out/latest"),
    seed: Annotated[int, typer.Option(min=0, help="Of splits and arrivals.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="The same for every request.")] = 1024,
    max_model_len: Annotated[int, typer.Option(min=16, help="Context, tokens.")] = 2048,
    kv_cache_gib: Annotated[int, typer.Option(min=1, help="KV cache on a CPU, GiB.")] = 2,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before each run.")] = 8,
    unloaded_requests: Annotated[
        int, typer.Option(min=1, help="Requests, one at a time, for the unloaded latency.")
    ] = 8,
    pace: Annotated[
        str | None,
        typer.Option(
            help="Hold each step to what this profile says (`alise simulate --help`), "
            "so that all systems meet the same speed; CPU only."
        ),
    ] = None,
    vllm_options: Annotated[str, typer.Option(help="More vLLM options, for all systems.")] = "",
    alise_options: Annotated[
        str, typer.Option(help="More options of `alise serve`, for the ALISE systems.")
    ] = "",
) -> None:
    """Run the systems side by side; finished runs in --out are kept and not run again."""
    try:
        settings = BenchSettings(
            out=out,
            model=_model(model),
            dataset=dataset or _packaged_dataset(mode),
            mode=mode,
            systems=_systems(systems),
            requests=requests,
            repeats=repeats,
            rates_per_s=_rates(rates),
            auto_load=auto_load,
            load_share=load_share,
            trace=trace,
            seed=seed,
            slots=slots,
            max_tokens=max_tokens,
            max_model_len=max_model_len,
            kv_cache_gib=kv_cache_gib,
            warmup=warmup,
            unloaded_requests=unloaded_requests,
            pace=_pace(pace),
            vllm_options=tuple(shlex.split(vllm_options)),
            alise_options=tuple(shlex.split(alise_options)),
        )
        # Only now: --help and wrong values need none of this.
        from alise_bench.bench import run_benchmark
        from alise_bench.progress import Progress

        # As Ctrl-C: servers must not outlive the benchmark.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run_benchmark(settings, Progress(console))
        _report(out)
    except BenchError as error:
        fail(error)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on where this one was ({out})")
        raise typer.Exit(130) from None


def _pace(name: str | None) -> str | None:
    if name is None:
        return None
    from alise_bench.simulation.profiles import load_profile, packaged_profiles

    if name in packaged_profiles():
        return name
    load_profile(name)  # what would fail in the engine fails now
    return str(Path(name).resolve())


def _packaged_dataset(mode: Mode) -> Path:
    if mode is Mode.RECORDED:
        raise BenchError("--mode recorded needs --dataset: the packaged prompts have no answers")
    from alise_bench.dataset import packaged_dataset

    return packaged_dataset()


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The --out of a benchmark.")]) -> None:
    """Make the report again from the raw rows."""
    try:
        _report(folder)
    except BenchError as error:
        fail(error)


@app.command()
def scheduler(
    waiting: Annotated[
        str, typer.Option(help="Numbers of waiting jobs, comma-separated.")
    ] = "10,1000,10000",
    slots: Annotated[str, typer.Option(help="Numbers of busy slots, comma-separated.")] = "16,256",
    steps: Annotated[int, typer.Option(min=10, help="Steps measured of each scheduler.")] = 200,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
) -> None:
    """Measure what `schedule()` costs per step against stock vLLM; no model is needed."""
    try:
        counts = _counts("--slots", slots), _counts("--waiting", waiting)
        from alise_bench.overhead import measure_overheads

        rows = []
        for row in measure_overheads(*counts, steps):
            rows.append(row)
            console.print(f"slots {row.slots}, waiting {row.waiting}: done", style="dim")
    except BenchError as error:
        fail(error)
    console.print(_overhead_table(rows))
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


@app.command()
def shadow(
    folder: Annotated[Path, typer.Argument(help="The --out of a benchmark with a run of fcfs.")],
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV cache of its engine, tokens.")] = 46_592,
) -> None:
    """Say what the sidecar's shadow FCFS makes of real runs, beside a real FCFS run of each."""
    from alise_bench.shadow_check import check_shadow, errors

    table = Table(title="to FCFS: the shadow's ratio, the real one, one over the other")
    table.add_column("run")
    for name in ("mean norm. latency", "mean JCT", "p99 JCT"):
        table.add_column(name, justify="right")
    try:
        for check in check_shadow(folder, kv_tokens):
            said, true = check.shadow, check.real
            ratios = (
                (said.mean_normalized_latency, true.mean_normalized_latency),
                (said.mean_jct, true.mean_jct),
                (said.p99_jct, true.p99_jct),
            )
            cells = [
                f"{a:.2f}/{b:.2f} = {off:.2f}"
                for (a, b), off in zip(ratios, errors(check), strict=True)
            ]
            table.add_row(check.run, *cells)
    except BenchError as error:
        fail(error)
    console.print(table)


@app.command("kv-copies")
def kv_copies(
    layers: Annotated[int, typer.Option(min=1)] = 30,
    kv_heads: Annotated[int, typer.Option(min=1)] = 3,
    head_size: Annotated[int, typer.Option(min=1)] = 64,
    block: Annotated[
        int, typer.Option(min=16, max=512, help="Tokens of a block; vLLM's default on CPUs.")
    ] = 128,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
) -> None:
    """Time the KV tier's copies against plain ones (default: SmolLM2-135M's KV cache)."""
    from alise_engine.kv_tier.layout import Quantization

    from alise_bench.kv_copies import KvShape, measure_copies

    shape = KvShape(layers, kv_heads, head_size)
    rows = [measure_copies(shape, quantization, block) for quantization in Quantization]
    table = Table(title="512 tokens of bfloat16 KV, one thread, ms (x plain)", title_justify="left")
    for name in ("kept as", "bytes/token", "of bfloat16", "plain copy", "store", "load"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.quantization.value,
            f"{row.bytes_per_token:,.0f}",
            f"{row.bytes_per_token / row.bfloat16_bytes_per_token:.3f}x",
            f"{1000 * row.plain_copy_s:.2f}",
            f"{1000 * row.store_s:.2f} ({row.store_s / row.plain_copy_s:.2f}x)",
            f"{1000 * row.load_s:.2f} ({row.load_s / row.plain_copy_s:.2f}x)",
        )
    console.print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


@app.command("kv-interference")
def kv_interference(
    model: Annotated[
        Path | None, typer.Option(help="Model folder; default: the embedded small model.")
    ] = None,
    steady_jobs: Annotated[int, typer.Option(min=1, help="Jobs that go on running.")] = 8,
    context: Annotated[int, typer.Option(min=16, max=512, help="Of each job, tokens.")] = 300,
    swap_every: Annotated[int, typer.Option(min=2, help="Steps from swap to swap.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, max=12, help="Of 32 steps, of each kind.")] = 8,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
) -> None:
    """Measure what swapping some jobs adds to the steps of those that go on running."""
    try:
        from alise_bench.kv_interference import measure_interference

        found = measure_interference(
            _model(model),
            steady_jobs=steady_jobs,
            context_tokens=context,
            swap_every=swap_every,
            rounds=rounds,
        )
    except BenchError as error:
        fail(error)
    table = Table(title=f"{steady_jobs} steady jobs, ms between tokens", title_justify="left")
    for name in ("steps", "number", "median", "mean", "p99"):
        table.add_column(name, justify="right")
    for kind, times in (("quiet", found.quiet), ("swapping", found.swapping)):
        figures = (times.median_ms, times.mean_ms, times.p99_ms)
        table.add_row(kind, str(times.steps), *(f"{figure:.1f}" for figure in figures))
    quiet, swapping = found.quiet, found.swapping
    ratios = (
        swapping.median_ms / quiet.median_ms,
        swapping.mean_ms / quiet.mean_ms,
        swapping.p99_ms / quiet.p99_ms,
    )
    table.add_row("ratio", "", *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)
    console.print(
        f"{found.swaps} swaps of {found.swapped_tokens:.0f} tokens (mean); "
        f"{found.restored_tokens:.0f} tokens came back from host memory"
    )
    if out is not None:
        out.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")


@app.command("kv-quality")
def kv_quality(
    dataset: Annotated[Path, typer.Option(help="JSONL of prompts with answers.")],
    model: Annotated[
        Path | None, typer.Option(help="Model folder; default: the embedded small model.")
    ] = None,
    answers: Annotated[int, typer.Option(min=1, help="How many recorded answers.")] = 100,
    max_model_len: Annotated[int, typer.Option(min=16, help="Longest context, tokens.")] = 2048,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
) -> None:
    """Measure what keeping KV in INT8 does to perplexity and next tokens, teacher-forced."""
    try:
        from transformers import AutoTokenizer

        from alise_bench.dataset import load_dataset, tokenize
        from alise_bench.kv_quality import measure_quality

        folder = _model(model)
        items = tokenize(
            load_dataset(dataset, need_response=True),
            AutoTokenizer.from_pretrained(folder),
            max_model_len=max_model_len,
            max_tokens=max_model_len // 2,
            with_answers=True,
        ).items[:answers]
        table = Table(title=f"{len(items)} answers of {dataset.name}", title_justify="left")
        for name in ("KV kept as", "of bfloat16", "perplexity", "change", "top-1 agrees"):
            table.add_column(name, justify="right")
        rows = []
        for row in measure_quality(folder, items):
            rows.append(row)
            console.print(f"{row.name}: done", style="dim")
            table.add_row(
                row.name,
                f"{row.bytes_against_bfloat16:.3f}x",
                f"{row.perplexity:.4f}",
                f"{100 * row.perplexity_change:+.3f}%",
                f"{100 * row.top1_agreement:.2f}%",
            )
    except BenchError as error:
        fail(error)
    console.print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


app.command()(predictor_cli.learning)
app.command()(predictor_cli.ablation)


def _counts(option: str, text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError as error:
        raise BenchError(f"{option} {text}: whole numbers with commas are needed") from error


def _overhead_table(rows: list[Overhead]) -> Table:
    table = Table(title="schedule() per step, ms: median (mean)", title_justify="left")
    for name in ("slots", "waiting", "stock", "alise", "overhead"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.slots),
            str(row.waiting),
            f"{row.stock_median_ms:.3f} ({row.stock_mean_ms:.3f})",
            f"{row.ours_median_ms:.3f} ({row.ours_mean_ms:.3f})",
            f"{row.median_overhead_ms:+.3f} ({row.mean_overhead_ms:+.3f})",
        )
    return table


def _report(folder: Path) -> None:
    from alise_bench.report import terminal_tables, write_report

    for table in terminal_tables(write_report(folder)):
        console.print(table)
    console.print(f"written: {folder}/report.json, {folder}/report.md and pictures beside them")


if __name__ == "__main__":
    app()
