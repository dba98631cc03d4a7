"""The report from canned raw rows: paired ratios, pictures, resuming, and honest gaps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alise_bench.errors import BenchError
from alise_bench.metrics import EngineCounts, RequestRow
from alise_bench.report import terminal_tables, write_report
from alise_bench.store import (
    Run,
    RunId,
    has_run,
    load_runs,
    open_plan,
    save_plan,
    save_run,
    schedule_of_runs,
)
from alise_bench.systems import System
from rich.console import Console

SETTINGS = {"mode": "recorded", "requests": 6, "slots": 16, "max_tokens": 1024, "seed": 0}


def canned(system: System, rate: float, repeat: int, s_per_token: float) -> Run:
    rows = [
        RequestRow(
            id=f"{n}",
            arrival_s=float(n),
            sent_s=n + 0.001,
            token_s=tuple(n + s_per_token * (t + 1) for t in range(2 + n)),
            finish_s=n + s_per_token * (2 + n),
            prompt_tokens=9,
        )
        for n in range(6)
    ]
    return Run(RunId(system, rate, repeat), tuple(rows), counts=EngineCounts(3), command=("serve",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan = open_plan(tmp_path, SETTINGS)
    save_plan(tmp_path, plan, unloaded_s_per_token=0.1, environment={"packages": {"vllm": "1"}})
    speeds = {System.FCFS: (0.4, 0.8, 0.6), System.ALISE: (0.1, 0.4, 0.3)}
    for rate in (1.0, 2.0):
        for system, by_repeat in speeds.items():
            for repeat, speed in enumerate(by_repeat):
                save_run(tmp_path, canned(system, rate, repeat, speed * rate))
    return tmp_path


def test_ratios_are_paired_before_the_median(folder: Path) -> None:
    report = write_report(folder)
    alise = report["loads"][0]["systems"]["alise"]
    assert alise["repeats"] == [0, 1, 2]
    assert alise["median"]["normalized_latency_s.mean"] == pytest.approx(0.3)
    ratio = alise["ratio_to_fcfs"]["normalized_latency_s.mean"]
    assert (ratio["min"], ratio["median"], ratio["max"]) == pytest.approx((0.25, 0.5, 0.5))


def test_everything_is_written(folder: Path) -> None:
    write_report(folder)
    report = json.loads((folder / "report.json").read_text())
    assert len(report["runs"]) == 12
    assert report["settings"] == SETTINGS
    text = (folder / "report.md").read_text()
    pictures = [
        "latency-against-load.png",
        "jct-distribution-rate1.png",
        "timeline-rate1.png",
        "jct-distribution-rate2.png",
        "timeline-rate2.png",
    ]
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    assert "0.300 (0.50x [0.25..0.50])" in text
    assert "6.0x its unloaded value" in text


def test_the_terminal_shows_all_systems(folder: Path) -> None:
    console = Console(width=150, record=True, file=(folder / "shown").open("w"))
    for table in terminal_tables(write_report(folder)):
        console.print(table)
    shown = console.export_text()
    assert "fcfs" in shown
    assert "alise" in shown
    assert "norm. latency mean" in shown


def test_failures_and_no_baseline_are_shown_not_hidden(tmp_path: Path) -> None:
    open_plan(tmp_path, SETTINGS)
    run = canned(System.ALISE, 1.0, 0, 0.2)
    failed = RequestRow("f", 0.0, 0.0, (), 0.5, 9, "HTTP 500")
    save_run(tmp_path, Run(run.id, (*run.rows, failed), EngineCounts(0), run.command))
    report = write_report(tmp_path)
    alise = report["loads"][0]["systems"]["alise"]
    assert alise["median"]["failures"] == 1
    assert alise["ratio_to_fcfs"] == {}
    assert alise["median"]["slowdown_longest_decile"] is None  # no unloaded value was measured


def test_nothing_but_failures_is_an_error(tmp_path: Path) -> None:
    open_plan(tmp_path, SETTINGS)
    failed = RequestRow("f", 0.0, 0.0, (), 0.5, 9, "refused")
    save_run(tmp_path, Run(RunId(System.FCFS, 1.0, 0), (failed,), EngineCounts(0), ()))
    with pytest.raises(BenchError, match="every request of every run failed"):
        write_report(tmp_path)


def test_raw_rows_survive_the_disk(tmp_path: Path) -> None:
    run = canned(System.ALISE_ORACLE, 1.5, 2, 0.25)
    assert not has_run(tmp_path, run.id)
    save_run(tmp_path, run)
    assert has_run(tmp_path, run.id)
    assert load_runs(tmp_path) == (run,)


def test_a_folder_is_not_mixed_with_other_settings(tmp_path: Path) -> None:
    open_plan(tmp_path, SETTINGS)
    assert open_plan(tmp_path, SETTINGS)["settings"] == SETTINGS
    with pytest.raises(BenchError, match=r"slots \(16 there\)"):
        open_plan(tmp_path, {**SETTINGS, "slots": 8})


@pytest.mark.parametrize("content", ["{", "{}", '{"system": "other"}'])
def test_a_damaged_run_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_text(content)
    with pytest.raises(BenchError, match=r"x\.json"):
        load_runs(tmp_path)


def test_runs_are_interleaved_and_each_is_there_once() -> None:
    runs = schedule_of_runs(tuple(System), (1.0, 2.0), 3)
    assert len(set(runs)) == len(runs) == 30
    firsts = [runs[i].system for i in range(0, 24, 8)]
    assert len(set(firsts)) == 3  # not the same system first in each repeat
    assert [run.repeat for run in runs] == sorted(run.repeat for run in runs)
