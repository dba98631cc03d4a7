"""`alise predictor`: train the predictor on past traffic, or see how well it would do."""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alise_scheduler.evaluation import Conversation, Latencies, Report

app = typer.Typer(
    name="predictor",
    help="Train the length predictor on past traffic, or see how well it would do.",
    no_args_is_help=True,
)

_File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE.jsonl",
        help='Rows {"messages": [{"role", "content"}, ...], "response"} or {"prompt", "response"}.',
    ),
]
_Model = Annotated[
    Path,
    typer.Option("--model", file_okay=False, help="Folder of the served model."),
]
_Encoder = Annotated[
    bool,
    typer.Option("--encoder/--no-encoder", help="Encode prompts, as a sidecar does by default."),
]
_MIN_ROWS = 64
_MAX_PROBLEMS_SHOWN = 5


@app.command()
def train(
    file: _File,
    model: _Model,
    state_dir: Annotated[
        Path, typer.Option("--state-dir", file_okay=False, help="The sidecar's state folder.")
    ],
    encoder: _Encoder = True,
) -> None:
    """Learn from FILE.jsonl; a sidecar started on the same state folder predicts at once."""
    from alise_scheduler.evaluation import trained_on

    with prepared(file, model, is_encoding=encoder) as (conversations, table):
        typer.echo(f"training on {len(conversations)} conversations ...")
        predictor = trained_on(conversations, table, state_dir)
        predictor.close()
        if predictor.store is not None and predictor.store.write_failures:
            raise _failure(f"cannot write to {state_dir}")
        if predictor.model_version == 0:
            raise _failure(
                "no model beats the plain distribution of lengths on these "
                f"{len(conversations)} rows; more of them may help"
            )
        typer.echo(
            f"model {predictor.model_version}, {predictor.sample_count} samples: {state_dir}"
        )


@app.command()
def evaluate(
    file: _File,
    model: _Model,
    train_share: Annotated[
        float, typer.Option(min=0.1, max=0.9, help="Share of the rows to train on.")
    ] = 0.7,
    seeds: Annotated[int, typer.Option(min=1, help="Random splits to average over.")] = 3,
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the figures here.")
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also time predictions, by the wall and in CPU time.")
    ] = False,
    encoder: _Encoder = True,
) -> None:
    """Train on a share of FILE.jsonl and score the predictions for the rest."""
    from alise_scheduler import evaluation

    with prepared(file, model, is_encoding=encoder) as (conversations, table):
        with _progress("training and scoring", seeds) as advance:
            try:
                report = evaluation.evaluate(conversations, table, train_share, seeds, advance)
            except ValueError as error:
                raise _failure(str(error)) from error
        timing = None
        if latency:
            predictor = evaluation.trained_on(conversations, table)
            timing = evaluation.measure_latency(predictor, conversations)
        _print(file, report, timing)
        if json_path is not None:
            figures = evaluation.report_to_json(report, timing)
            json_path.write_text(json.dumps(figures, indent=2) + "\n")


@contextmanager
def prepared(
    file: Path, model: Path, *, is_encoding: bool = True
) -> Iterator[tuple[list[Conversation], Path]]:
    """Yield the tokenized rows and the path of the model's token table.

    With the prompts' encodings, where `is_encoding` and there is an encoder.
    """
    from alise_scheduler import conversations as source

    try:
        rows, problems = source.read_rows(file)
        for problem in problems[:_MAX_PROBLEMS_SHOWN]:
            typer.echo(f"{file}: {problem}", err=True)
        if len(problems) > _MAX_PROBLEMS_SHOWN:
            typer.echo(f"{file}: {len(problems)} bad lines in all, left out", err=True)
        if len(rows) < _MIN_ROWS:
            raise _failure(f"{file}: {len(rows)} usable rows, at least {_MIN_ROWS} are needed")
        tokenizer = source.load_tokenizer(model)
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "table.npz"
            with _progress("reading the model", 1) as advance:
                source.build_table(model, table)
                advance()
            with _progress("tokenizing", len(rows)) as advance:
                tokenized = source.tokenize(rows, tokenizer, advance)
            if is_encoding:
                with _progress("encoding prompts", len(rows)) as advance:
                    tokenized = source.encoded(tokenized, table, advance)
            yield tokenized, table
    except source.ConversationsError as error:
        raise _failure(str(error)) from error


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function that advances a progress display by one."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        typer.echo(f"{what} ...", err=True)
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _print(file: Path, report: Report, latency: Latencies | None) -> None:
    typer.echo(f"{file.name}: {report.train_jobs} jobs to train on, {report.test_jobs} not seen")
    typer.echo(
        f"  at arrival           tau-b {report.tau_b_by_look_ups:.3f}"
        f"   encoded {report.tau_b:.3f}   MAE {report.mae_tokens:.0f} tokens"
    )
    typer.echo(
        f"  coverage             p50 {report.p50_coverage:.1%}   p90 {report.p90_coverage:.1%}"
    )
    for tokens, tau in report.tau_b_remaining.items():
        typer.echo(
            f"  left at {tokens:4d} tokens   tau-b {tau:.3f}"
            f"   (from the prompt alone {report.tau_b_remaining_by_prompt[tokens]:.3f})"
        )
    if latency is not None:
        for clock, figures in (("wall", latency.wall), ("CPU", latency.cpu)):
            typer.echo(
                f"  {clock:4} time            {figures.single_median_ms:.2f} ms median,"
                f" {figures.single_p99_ms:.2f} ms p99 for one prompt;"
                f" {figures.batched_prompts_per_s:.0f} prompts/s in batches;"
                f" {figures.refresh_256_ms:.1f} ms to refresh 256 answers"
            )


def _failure(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)
