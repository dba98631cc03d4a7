"""The benchmark: prepares data, predictor and load, then runs every system in its turn.

One server at a time, started for its run and ended after it, so that nothing else is resident
and no learned state passes from one run to another.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alise_bench import natural
from alise_bench.client import Answer, Ask
from alise_bench.dataset import (
    Item,
    fingerprint,
    load_dataset,
    split_for_repeat,
    tokenize,
)
from alise_bench.environment import describe_environment
from alise_bench.errors import BenchError
from alise_bench.load import arrivals_of, capacity_per_s, measure_load
from alise_bench.metrics import RequestRow
from alise_bench.predictor_state import fresh_state
from alise_bench.progress import Progress
from alise_bench.replay_table import write_replay_table
from alise_bench.server import (
    engine_counts,
    free_port,
    has_trained_model,
    is_sidecar_connected,
    running_server,
    wait_for_sidecar,
)
from alise_bench.session import Session, at_once, send
from alise_bench.settings import BenchSettings, Mode
from alise_bench.store import (
    Run,
    RunId,
    has_run,
    open_plan,
    save_plan,
    save_run,
    schedule_of_runs,
    write_json,
)
from alise_bench.systems import Pace, ServerSettings, System, command, environment


def run_benchmark(settings: BenchSettings, progress: Progress) -> None:
    """Run what is not yet done of the benchmark in `settings.out`.

    Raises `BenchError` for anything that a user can put right.
    """
    session = _prepare(settings, progress)
    measure_load(session)
    with tempfile.TemporaryDirectory(prefix="alise-bench-") as shared:
        _run_all(session, Path(shared))


def _run_all(session: Session, shared_dir: Path) -> None:
    """Run what is not done yet; `shared_dir` keeps the engine's token table between runs."""
    settings, progress = session.settings, session.progress
    rates: list[float] = session.plan["rates_per_s"]
    runs = schedule_of_runs(settings.systems, rates, settings.repeats)
    todo = [run for run in runs if not has_run(settings.out, run)]
    for done, run in enumerate(todo, start=len(runs) - len(todo)):
        progress.step(f"run {done + 1} of {len(runs)}: {run.name}")
        save_run(settings.out, _run(session, run, shared_dir))


def _prepare(settings: BenchSettings, progress: Progress) -> Session:
    from transformers import AutoTokenizer  # heavy

    progress.step("reading and tokenizing the data set")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    recorded = settings.mode is Mode.RECORDED
    rows = load_dataset(settings.dataset, need_response=recorded)
    tokenized = tokenize(
        rows,
        tokenizer,
        max_model_len=settings.max_model_len,
        max_tokens=settings.max_tokens,
        with_answers=recorded,
    )
    items = tokenized.items
    # What would fail later fails now.
    split_for_repeat(items, settings.requests, 0, settings.seed)
    arrivals_of(settings, rate_per_s=1.0, repeat=0)
    plan = open_plan(settings.out, {**settings.as_plan(), "data": fingerprint(items)})
    left_out = {"usable_prompts": len(items), "left_out": tokenized.left_out}
    save_plan(settings.out, plan, environment=describe_environment(), **left_out)
    for reason, count in tokenized.left_out.items():
        progress.note(f"left out {count} of {len(rows)} rows: {reason}")
    replay_file = settings.out / "answers.npz" if recorded else None
    if replay_file is not None:
        write_replay_table({item.key: item.answer_ids for item in items}, replay_file)
    servers = ServerSettings(
        settings.model,
        settings.slots,
        settings.max_model_len,
        settings.kv_cache_gib,
        settings.vllm_options,
        replay_file.resolve() if replay_file else None,
        Pace(settings.pace, (settings.out / "pace.json").resolve()) if settings.pace else None,
    )
    if not recorded:
        items = _natural_answers(settings, servers, items, plan, progress)
    write_json(settings.out / "true_lengths.json", {i.key: i.output_tokens for i in items})
    return Session(settings, servers, items, plan, progress)


def _natural_answers(
    settings: BenchSettings,
    servers: ServerSettings,
    items: tuple[Item, ...],
    plan: dict[str, Any],
    progress: Progress,
) -> tuple[Item, ...]:
    file = settings.out / "natural_answers.json"
    if not file.exists():
        progress.step("natural mode: the model answers all prompts once, to train and to compare")
        port = free_port()
        line = command(System.FCFS, servers, port)
        log = settings.out / "logs" / "natural_answers.log"
        with running_server(line, environment(servers, os.environ), port, log) as url:
            answers = send(url, settings, at_once(items), progress, settings.slots)
        save_plan(settings.out, plan, capacity_per_s=capacity_per_s(answers, settings.slots))
        write_json(file, natural.answers_to_json(items, answers))
    return natural.with_answers(items, file)


def _run(session: Session, run: RunId, shared_dir: Path) -> Run:
    settings, split = session.settings, session.split(run.repeat)
    state_dir: Path | None = None
    if not run.system.is_stock:
        state_dir = fresh_state(session, split, run.repeat)
    port, metrics_port = free_port(), free_port()
    line = command(
        run.system,
        session.servers,
        port,
        metrics_port=metrics_port,
        state_dir=state_dir,
        shared_dir=shared_dir,
        oracle_file=(session.out / "true_lengths.json").resolve(),
        alise_options=settings.alise_options,
    )
    log = session.out / "logs" / f"{run.name}.log"
    arrivals = arrivals_of(settings, run.rate_per_s, run.repeat)
    try:
        with running_server(line, environment(session.servers, os.environ), port, log) as url:
            if not run.system.is_stock:
                wait_for_sidecar(url)
            if run.system.is_predicting and not has_trained_model(metrics_port):
                raise BenchError(
                    f"{run.name}: the sidecar did not load the trained model; if ALISE has changed "
                    f"since it was trained, remove {session.out}/trained and run again ({log})"
                )
            asks = [_ask(run.system, item, 0.0) for item in _warmup(split.train, settings.warmup)]
            if asks:
                send(url, settings, asks, session.progress)
            before = engine_counts(url, session.servers.pace)
            asks = [_ask(run.system, item, t) for item, t in zip(split.test, arrivals, strict=True)]
            answers = send(url, settings, asks, session.progress)
            counts = engine_counts(url, session.servers.pace) - before
            session.progress.pace(counts.late_share)
            if not run.system.is_stock and not is_sidecar_connected(url):
                raise BenchError(f"{run.name}: the sidecar was lost in the run; see {log}")
    finally:
        if state_dir is not None:
            shutil.rmtree(state_dir, ignore_errors=True)
    rows = _judged(answers, split.test, settings.mode)
    return Run(run, rows, counts, tuple(line))


def _ask(system: System, item: Item, arrival_s: float) -> Ask:
    priority = item.output_tokens if system is System.PRIORITY_ORACLE else 0
    return Ask(item, arrival_s, priority)


def _warmup(train: Sequence[Item], count: int) -> list[Item]:
    """Return `count` training prompts of middling answers: a short warm-up, without outliers."""
    lengths = sorted(item.output_tokens for item in train)
    middle = lengths[len(lengths) // 2]
    return sorted(train, key=lambda item: abs(item.output_tokens - middle))[:count]


def _judged(answers: Sequence[Answer], items: Sequence[Item], mode: Mode) -> tuple[RequestRow, ...]:
    """Return the rows, where an answer that is not the recorded one has failed."""
    if mode is not Mode.RECORDED:
        return tuple(answer.row for answer in answers)
    return tuple(
        replace(answer.row, error="tokens differ from the recorded answer")
        if answer.row.error is None and answer.token_ids != item.answer_ids
        else answer.row
        for answer, item in zip(answers, items, strict=True)
    )
