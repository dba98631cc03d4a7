"""The benchmark: prepares data, predictor and load, then runs every system in its turn.

One server at a time, started for its run and ended after it, so that nothing else is resident
and no learned state passes from one run to another.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from alise_bench import natural
from alise_bench.arrivals import load_trace, poisson_arrivals, trace_window
from alise_bench.client import Answer, Ask, run_load
from alise_bench.dataset import (
    Item,
    Split,
    fingerprint,
    load_dataset,
    split_for_repeat,
    tokenize,
    write_training_file,
)
from alise_bench.environment import describe_environment
from alise_bench.errors import BenchError
from alise_bench.load_search import find_rate
from alise_bench.metrics import RequestRow, run_metrics
from alise_bench.progress import Progress
from alise_bench.replay_table import write_replay_table
from alise_bench.server import free_port, preemptions, running_server
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
from alise_bench.systems import SERVED_NAME, ServerSettings, System, command, environment

_CAPACITY_ROUNDS: Final = 3
_TRAIN_TIMEOUT_S: Final = 900


@dataclass(frozen=True, slots=True)
class _Bench:
    """All that the steps share."""

    settings: BenchSettings
    servers: ServerSettings
    items: tuple[Item, ...]
    plan: dict[str, Any]
    progress: Progress

    @property
    def out(self) -> Path:
        return self.settings.out

    def split(self, repeat: int) -> Split:
        s = self.settings
        return split_for_repeat(self.items, s.requests, repeat, s.seed)


def run_benchmark(settings: BenchSettings, progress: Progress) -> None:
    """Run what is not yet done of the benchmark in `settings.out`.

    Raises `BenchError` for anything that a user can put right.
    """
    bench = _prepare(settings, progress)
    _measure_load(bench)
    rates: list[float] = bench.plan["rates_per_s"]
    runs = schedule_of_runs(settings.systems, rates, settings.repeats)
    todo = [run for run in runs if not has_run(settings.out, run)]
    for done, run in enumerate(todo, start=len(runs) - len(todo)):
        progress.step(f"run {done + 1} of {len(runs)}: {run.name}")
        save_run(settings.out, _run(bench, run))


def _prepare(settings: BenchSettings, progress: Progress) -> _Bench:
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
    split_for_repeat(items, settings.requests, 0, settings.seed)  # fails now if it ever will
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
    )
    if not recorded:
        items = _natural_answers(settings, servers, items, plan, progress)
    write_json(settings.out / "true_lengths.json", {i.key: i.output_tokens for i in items})
    return _Bench(settings, servers, items, plan, progress)


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
            answers = _load(url, settings, [Ask(i, 0.0) for i in items], progress, settings.slots)
        save_plan(settings.out, plan, capacity_per_s=_capacity_per_s(answers, settings.slots))
        write_json(file, natural.answers_to_json(items, answers))
    return natural.with_answers(items, file)


def _load(
    url: str,
    settings: BenchSettings,
    asks: Sequence[Ask],
    progress: Progress,
    max_concurrency: int | None = None,
) -> list[Answer]:
    with progress.requests(len(asks)) as on_done:
        load = run_load(url, SERVED_NAME, asks, settings.max_tokens, on_done, max_concurrency)
        answers = asyncio.run(load)
    if all(answer.row.error is not None for answer in answers):
        raise BenchError(f"every request failed; the first: {answers[0].row.error}")
    return answers


def _measure_load(bench: _Bench) -> None:
    """Measure the unloaded latency, and choose the rates unless they were given.

    With stock vLLM, asking prompts of the first repeat's training part.
    """
    settings, plan = bench.settings, bench.plan
    if "unloaded_s_per_token" in plan and "rates_per_s" in plan:
        return
    port = free_port()
    line = command(System.FCFS, bench.servers, port)
    log = bench.out / "logs" / "load.log"
    with running_server(line, environment(bench.servers, os.environ), port, log) as url:
        train = bench.split(0).train
        bench.progress.step("unloaded latency: one request at a time")
        _load(url, settings, _at_once(train[-2:]), bench.progress)
        asks = _at_once(train[: settings.unloaded_requests])
        answers = _load(url, settings, asks, bench.progress, 1)
        unloaded = _mean_normalized_latency_s(answers)
        bench.progress.note(f"unloaded: {unloaded:.4f} s/token")
        save_plan(bench.out, plan, unloaded_s_per_token=unloaded)
        save_plan(bench.out, plan, rates_per_s=_choose_rates(bench, url, train, unloaded))
    rates = ", ".join(f"{rate:.3g}" for rate in plan["rates_per_s"])
    bench.progress.note(f"load: {rates} requests/s")


def _choose_rates(bench: _Bench, url: str, train: Sequence[Item], unloaded: float) -> list[float]:
    settings, plan = bench.settings, bench.plan
    if settings.rates_per_s:
        return list(settings.rates_per_s)
    if "capacity_per_s" not in plan:
        bench.progress.step("capacity: all slots kept full")
        asks = _at_once(train[: _CAPACITY_ROUNDS * settings.slots])
        answers = _load(url, settings, asks, bench.progress, settings.slots)
        save_plan(bench.out, plan, capacity_per_s=_capacity_per_s(answers, settings.slots))
    capacity: float = plan["capacity_per_s"]
    bench.progress.note(f"capacity: about {capacity:.3g} requests/s")
    if settings.auto_load is None:
        return [settings.load_share * capacity]

    def measure(rate_per_s: float) -> float:
        bench.progress.step(f"load search: FCFS at {rate_per_s:.3g} requests/s")
        # As long a run as the judged ones (a queue grows with time), with the training prompts.
        asked = [train[i % len(train)] for i in range(settings.requests)]
        arrivals = _arrivals(settings, rate_per_s, repeat=0)
        asks = [Ask(item, t) for item, t in zip(asked, arrivals, strict=True)]
        ratio = _mean_normalized_latency_s(_load(url, settings, asks, bench.progress)) / unloaded
        bench.progress.note(f"FCFS at {rate_per_s:.3g} requests/s: {ratio:.2f}x unloaded")
        return ratio

    rate, probes = find_rate(settings.auto_load, capacity, measure)
    save_plan(bench.out, plan, probes=[[p.rate_per_s, p.ratio] for p in probes])
    return [rate]


def _capacity_per_s(answers: Sequence[Answer], slots: int) -> float:
    """Return the requests per second that full slots serve, from a closed loop over `slots`."""
    # Slots over the mean time in a slot: the end, where slots run empty, counts for little.
    rows = [answer.row for answer in answers if answer.row.error is None]
    return slots * len(rows) / sum(row.finish_s - row.arrival_s for row in rows)


def _at_once(items: Sequence[Item]) -> list[Ask]:
    return [Ask(item, 0.0) for item in items]


def _mean_normalized_latency_s(answers: Sequence[Answer]) -> float:
    rows = [answer.row for answer in answers]
    return run_metrics(rows, 0, unloaded_s_per_token=1.0).normalized_latency_s.mean


def _arrivals(settings: BenchSettings, rate_per_s: float, repeat: int) -> tuple[float, ...]:
    if settings.trace is None:
        return poisson_arrivals(rate_per_s, settings.requests, settings.seed * 1000 + repeat)
    trace = load_trace(settings.trace)
    return trace_window(trace, settings.requests, repeat * settings.requests, rate_per_s)


def _run(bench: _Bench, run: RunId) -> Run:
    settings, split = bench.settings, bench.split(run.repeat)
    state_dir: Path | None = None
    if not run.system.is_stock:
        state_dir = _fresh_state(bench, split, run.repeat)
    port = free_port()
    line = command(
        run.system,
        bench.servers,
        port,
        state_dir=state_dir,
        oracle_file=(bench.out / "true_lengths.json").resolve(),
        alise_options=settings.alise_options,
    )
    log = bench.out / "logs" / f"{run.name}.log"
    arrivals = _arrivals(settings, run.rate_per_s, run.repeat)
    try:
        with running_server(line, environment(bench.servers, os.environ), port, log) as url:
            asks = [_ask(run.system, item, 0.0) for item in _warmup(split.train, settings.warmup)]
            if asks:
                _load(url, settings, asks, bench.progress)
            before = preemptions(url)
            asks = [_ask(run.system, item, t) for item, t in zip(split.test, arrivals, strict=True)]
            answers = _load(url, settings, asks, bench.progress)
            preempted = preemptions(url) - before
    finally:
        if state_dir is not None:
            shutil.rmtree(state_dir, ignore_errors=True)
    rows = _judged(answers, split.test, settings.mode)
    return Run(run, rows, preempted, tuple(line))


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


def _fresh_state(bench: _Bench, split: Split, repeat: int) -> Path:
    """Return a copy of the state trained for this repeat: a run's online learning stays its own."""
    trained = (bench.out / "trained" / f"repeat{repeat}").resolve()
    if not trained.exists():
        _train(bench, split, trained)
    copy = Path(tempfile.mkdtemp(prefix="alise-bench-state-"))
    shutil.copytree(trained, copy, dirs_exist_ok=True)
    return copy


def _train(bench: _Bench, split: Split, trained: Path) -> None:
    bench.progress.step(f"training the predictor on {len(split.train)} other prompts")
    staging = trained.with_suffix(".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    file = trained.with_suffix(".jsonl")
    write_training_file(split.train, file)
    line = [sys.executable, "-m", "alise_scheduler", "predictor", "train", str(file)]
    line += ["--model", str(bench.settings.model), "--state-dir", str(staging)]
    done = subprocess.run(
        line,
        env=environment(bench.servers, os.environ),
        capture_output=True,
        text=True,
        timeout=_TRAIN_TIMEOUT_S,
        check=False,
    )
    trained.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise BenchError(f"`alise predictor train` failed:\n{done.stderr[-2000:]}")
    staging.rename(trained)
