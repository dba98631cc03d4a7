"""`alise simulate`: the modules that serve, on a modelled engine."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alise_bench.dataset import Conversation, Item
from alise_bench.errors import BenchError
from alise_bench.metrics import EngineCounts, RequestRow
from alise_bench.simulation.against import Recorded, compare_with_runs, steps_of
from alise_bench.simulation.carried import load_carried
from alise_bench.simulation.cli import app
from alise_bench.simulation.compare import metrics_of, simulate
from alise_bench.simulation.measure import profile_of, samples
from alise_bench.simulation.predictors import NoisyPredictor, SavedPredictor
from alise_bench.simulation.profiles import (
    Profile,
    TierSpeed,
    load_profile,
    packaged_profiles,
    save_profile,
)
from alise_bench.simulation.systems import ALISE, FCFS, SYSTEMS
from alise_bench.simulation.tables import systems_table
from alise_bench.simulation.what_if import parse_objective, replicas_needed
from alise_bench.simulation.workload import (
    capacity_per_s,
    load_trace_requests,
    poisson_items,
    poisson_requests,
    stretched,
)
from alise_bench.store import Run, RunId, save_run, write_json
from alise_bench.systems import System
from alise_scheduler.cost_model import StepCost
from alise_scheduler.predictor import PromptInput
from alise_scheduler.replica import Hardware, Outcome, SimulatedRequest
from rich.console import Console
from typer.testing import CliRunner

HARDWARE = Hardware(StepCost(0.04, 2e-4, 1.4e-3), slots=16, kv_tokens=200_000)
FAST_TIER = TierSpeed(1e-5, 1e-5, 10**6, is_in_step=False)
PROFILE = Profile("test", "made up", HARDWARE, FAST_TIER)
# Short answers among long ones: what shortest-first lives on.
LENGTHS = [(30, 20)] * 6 + [(40, 120)] * 3 + [(60, 600)]


def at_load(share: float, count: int = 400, seed: int = 0) -> tuple[SimulatedRequest, ...]:
    return poisson_requests(LENGTHS, share * capacity_per_s(LENGTHS, HARDWARE), count, seed)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_finishes_every_request_with_all_its_tokens(name: str) -> None:
    requests = at_load(1.2, 150)
    outcomes = simulate(SYSTEMS[name], requests, PROFILE, sigma=0.8)
    assert [o.output_tokens for o in outcomes] == [r.output_tokens for r in requests]
    for outcome in outcomes:
        assert outcome.arrival_s < outcome.first_token_s <= outcome.finish_s < math.inf
        assert outcome.recomputed_tokens <= outcome.preempted_tokens


def test_predictions_lower_the_mean_near_capacity_and_the_tail_is_held() -> None:
    requests = at_load(0.95, 1500)
    fcfs = metrics_of(simulate(FCFS, requests, PROFILE, sigma=0.8))
    ours = metrics_of(simulate(ALISE, requests, PROFILE, sigma=0.8))
    assert ours.normalized_latency_s < 0.75 * fcfs.normalized_latency_s
    assert ours.jct_s < fcfs.jct_s
    assert ours.jct_p99_s < 1.15 * fcfs.jct_p99_s


def test_in_a_long_overload_short_jobs_go_on_passing_and_the_tail_is_held() -> None:
    requests = at_load(1.25, 1500)
    fcfs = metrics_of(simulate(FCFS, requests, PROFILE, sigma=0.8))
    ours = metrics_of(simulate(ALISE, requests, PROFILE, sigma=0.8))
    assert ours.normalized_latency_s < 0.5 * fcfs.normalized_latency_s
    assert ours.jct_p99_s < 1.15 * fcfs.jct_p99_s


def test_where_prompts_and_not_slots_are_short_order_helps_as_well() -> None:
    # As code completion does to a GPU: long prompts, answers of some tokens, slots to spare.
    lengths = [(400, 10), (1500, 15), (1500, 60), (6000, 20)]
    hardware = replace(HARDWARE, slots=256, kv_tokens=10**6, batched_tokens=8192)
    profile = replace(PROFILE, hardware=hardware)
    requests = poisson_requests(lengths, 1.1 * capacity_per_s(lengths, hardware), 1500, 0)
    fcfs = metrics_of(simulate(FCFS, requests, profile, sigma=0.8))
    ours = metrics_of(simulate(ALISE, requests, profile, sigma=0.8))
    assert ours.normalized_latency_s < 0.85 * fcfs.normalized_latency_s
    assert ours.jct_s < 0.95 * fcfs.jct_s
    assert ours.jct_p99_s < 1.15 * fcfs.jct_p99_s
    assert ours.ttft_p99_s < 1.15 * fcfs.ttft_p99_s


def test_at_low_load_all_is_as_with_stock() -> None:
    requests = at_load(0.2)
    fcfs = metrics_of(simulate(FCFS, requests, PROFILE, sigma=0.8))
    ours = metrics_of(simulate(ALISE, requests, PROFILE, sigma=0.8))
    assert ours.normalized_latency_s == pytest.approx(fcfs.normalized_latency_s, rel=1e-3)


def test_early_first_tokens_come_early() -> None:
    requests = at_load(1.1)
    usual = metrics_of(simulate(ALISE, requests, PROFILE, sigma=0.8))
    early = metrics_of(simulate(SYSTEMS["alise-early"], requests, PROFILE, sigma=0.8))
    assert early.ttft_p99_s < 0.5 * usual.ttft_p99_s


def test_without_preemption_answers_stream_as_with_stock() -> None:
    requests = at_load(1.1)
    fcfs = metrics_of(simulate(FCFS, requests, PROFILE, sigma=0.8))
    ours = metrics_of(simulate(SYSTEMS["alise-no-preempt"], requests, PROFILE, sigma=0.8))
    assert ours.preemptions == 0
    assert ours.longest_gap_p99_s == pytest.approx(fcfs.longest_gap_p99_s, rel=0.3)


def test_the_tier_saves_what_preempting_would_compute_again() -> None:
    requests = at_load(1.2)
    kept = metrics_of(simulate(SYSTEMS["boost-attained"], requests, PROFILE, sigma=0.8))
    assert kept.preemptions > 10
    assert kept.recomputed_share < 0.1
    # Nor does the prefix cache keep much where running jobs take most of the space.
    full = replace(HARDWARE, kv_tokens=5_000)
    tiny = Profile("tiny", "", full, TierSpeed(1e-5, 1e-5, 200, is_in_step=True))
    lost = metrics_of(simulate(SYSTEMS["boost-attained"], requests, tiny, sigma=0.8))
    assert lost.recomputed_share > 0.5


def test_what_if_finds_the_smallest_number_of_replicas() -> None:
    requests = at_load(3.0)
    objective = parse_objective("ttft_p99_s<=1")
    answer = replicas_needed(FCFS, requests, PROFILE, objective, sigma=0.8, most=16)
    assert answer.replicas is not None
    assert objective.is_met(answer.metrics)
    fewer = simulate(FCFS, requests, PROFILE, sigma=0.8, replicas=answer.replicas - 1)
    assert not objective.is_met(metrics_of(fewer))


@pytest.mark.parametrize("text", ["", "p99<3", "jct_s<=", "speed<=3", "jct_s<=1e"])
def test_an_objective_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match=r"METRIC<=NUMBER|not a number"):
        parse_objective(text)


def test_a_trace_of_azure_and_one_of_our_own(tmp_path: Path) -> None:
    csv = tmp_path / "trace.csv"
    csv.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:48.1805900,0,5\n"
        "2023-11-16 18:15:50.0000000,10,0\n"
    )
    rows = load_trace_requests(csv)
    assert [(r.prompt_tokens, r.output_tokens) for r in rows] == [(374, 44), (1, 5)]
    assert rows[1].arrival_s == pytest.approx(1.5)
    jsonl = tmp_path / "trace.jsonl"
    jsonl.write_text('{"arrival_s": 5, "prompt_tokens": 3, "output_tokens": 2}\n\n')
    assert load_trace_requests(jsonl) == (SimulatedRequest(0.0, 3, 2),)
    assert stretched(rows, 4.0)[1].arrival_s == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n"),
        ("b.csv", "TIME,Tokens\n1,2\n"),
        ("c.jsonl", '{"arrival_s": 1}\n'),
        ("d.jsonl", "no json\n"),
    ],
)
def test_a_broken_trace_is_refused_by_row(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BenchError, match=f"{name}, row 1: .*needed are TIMESTAMP"):
        load_trace_requests(tmp_path / name)


@pytest.mark.parametrize("name", packaged_profiles())
def test_packaged_profiles_say_where_they_come_from(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source.startswith(("measured: ", "derived, not measured: "))
    save_profile(profile, tmp_path / "copy.json")
    assert load_profile(str(tmp_path / "copy.json")) == profile


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="neither a file nor one of flat-16, llama3"):
        load_profile("b200")
    (tmp_path / "p.json").write_text('{"name": "x"}')
    with pytest.raises(BenchError, match="not a profile"):
        load_profile(str(tmp_path / "p.json"))


ENGINE_PAGE = """
vllm:cache_config_info{block_size="32",num_gpu_blocks="288"} 1.0
alise_kv_tier_moved_bytes_total{direction="load"} 20000.0
alise_kv_tier_bandwidth_bytes_per_second{direction="load"} 400000.0
alise_kv_tier_bandwidth_bytes_per_second{direction="store"} 100000.0
alise_kv_tier_restored_tokens_total 100.0
"""
SIDECAR_PAGE = "\n".join(
    f'alise_cost_model_seconds{{engine="e",coefficient="{name}"}} {value}'
    for name, value in (
        ("base", 0.05),
        ("prefill_token", 0.003),
        ("decode_job", 0.004),
        ("context_token", 1e-6),
    )
)


def test_a_profile_is_read_off_two_metrics_pages() -> None:
    pages = samples(ENGINE_PAGE), samples(SIDECAR_PAGE + "\n")
    rest = {"name": "here", "slots": 16, "batched_tokens": 2048, "host_bytes": 2e6}
    profile = profile_of(*pages, **rest, is_in_step=True)
    assert profile.hardware.step == StepCost(0.05, 0.003, 0.004, 1e-6)
    assert profile.hardware.kv_tokens == 288 * 32
    assert profile.tier == TierSpeed(0.002, 0.0005, 10_000, is_in_step=True)
    assert (
        profile_of(samples(ENGINE_PAGE.split("alise")[0]), pages[1], **rest, is_in_step=True).tier
        is None
    )
    with pytest.raises(BenchError, match="let the engine answer some requests first"):
        profile_of(pages[0], {}, **rest, is_in_step=True)


def test_steps_are_found_in_the_times_of_tokens() -> None:
    rows = (
        RequestRow("a", 0.0, 0.0, (1.0, 1.1, 1.2), 1.2, prompt_tokens=10),
        RequestRow("b", 0.0, 0.0, (1.1001, 1.2001), 1.2, prompt_tokens=20),
    )
    first, second = steps_of(rows)
    assert (first.prefill_tokens, first.decode_jobs, first.context_tokens) == (20, 1, 11)
    assert (second.prefill_tokens, second.decode_jobs, second.context_tokens) == (0, 2, 12 + 21)
    assert first.duration_s == pytest.approx(0.1)


def test_an_answers_first_token_may_come_late() -> None:
    # As the server begins the answer with it: half a step after the others of its step.
    rows = (
        RequestRow("a", 0.0, 0.0, (1.0, 1.5, 1.6, 1.7), 1.7, prompt_tokens=10),
        RequestRow("b", 0.0, 0.0, (1.55, 1.6, 1.7), 1.7, prompt_tokens=20),
    )
    assert [(s.prefill_tokens, s.decode_jobs, round(s.duration_s, 9)) for s in steps_of(rows)] == [
        (20, 1, 0.5),
        (0, 2, 0.1),
        (0, 2, 0.1),
    ]


def test_an_answers_first_token_may_come_together_with_the_next() -> None:
    rows = (
        RequestRow("a", 0.0, 0.0, (1.0, 1.5, 1.6, 1.7), 1.7, prompt_tokens=10),
        RequestRow("b", 0.0, 0.0, (1.599, 1.601, 1.7), 1.7, prompt_tokens=20),
    )
    assert [(s.prefill_tokens, s.decode_jobs, round(s.duration_s, 2)) for s in steps_of(rows)] == [
        (20, 1, 0.5),
        (0, 2, 0.1),
        (0, 2, 0.1),
    ]


def test_a_benchmarks_runs_are_simulated(tmp_path: Path) -> None:
    # Rows that the model itself has made, one job at a time: it must find its own figures again.
    requests = poisson_requests(LENGTHS, 0.001, 30, 0)
    rows = tuple(
        _row(str(number), outcome, request)
        for number, (outcome, request) in enumerate(
            zip(simulate(FCFS, requests, PROFILE, sigma=0.0), requests, strict=True)
        )
    )
    save_run(tmp_path, Run(RunId(System.FCFS, 1.0, 0), rows, EngineCounts(0), ()))
    write_json(tmp_path / "plan.json", {"settings": {"slots": 16}})
    out = tmp_path / "out"
    ended = CliRunner().invoke(app, ["--against", str(tmp_path), "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    assert "fcfs-rate1" in ended.output
    (compared,) = json.loads((out / "report.json").read_text()).values()
    assert compared["simulated"]["jct_s"] == pytest.approx(compared["real"]["jct_s"], rel=0.02)


def test_runs_are_simulated_with_the_models_that_they_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = at_load(0.9, 40)
    items = {
        str(number): Item("", "", (1,), tuple(range(row.output_tokens)), Conversation("", (), ""))
        for number, row in enumerate(requests)
    }
    for system, simulated in ((System.FCFS, FCFS), (System.ALISE, ALISE)):
        outcomes = simulate(simulated, requests, PROFILE, sigma=0.0)
        rows = tuple(
            _row(str(number), *pair)
            for number, pair in enumerate(zip(outcomes, requests, strict=True))
        )
        save_run(tmp_path, Run(RunId(system, 1.0, 2), rows, EngineCounts(0), ()))
    write_json(tmp_path / "plan.json", {"settings": {"slots": 16}})
    loaded: list[Path] = []

    def saved(state_dirs: Sequence[Path], _model: Path) -> list[NoisyPredictor]:
        loaded.extend(state_dirs)
        return [NoisyPredictor(0.0, 0) for _ in state_dirs]

    monkeypatch.setattr("alise_bench.simulation.against.saved_predictors", saved)
    compared = compare_with_runs(tmp_path, PROFILE, 0.8, Recorded(items, tmp_path))
    assert [c.run for c in compared] == ["alise-rate1-repeat2", "fcfs-rate1-repeat2"]
    assert loaded == [tmp_path / "trained" / "repeat2"]
    with pytest.raises(BenchError, match="no usable row '0'"):
        compare_with_runs(tmp_path, PROFILE, 0.8, Recorded({}, tmp_path))


def _row(name: str, outcome: Outcome, request: SimulatedRequest) -> RequestRow:
    tokens = outcome.output_tokens
    step_s = (outcome.finish_s - outcome.first_token_s) / max(tokens - 1, 1)
    times = tuple(outcome.first_token_s + i * step_s for i in range(tokens))
    return RequestRow(
        name, outcome.arrival_s, outcome.arrival_s, times, outcome.finish_s, request.prompt_tokens
    )


def test_the_command_compares_and_answers_what_if(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"arrival_s": r.arrival_s, "prompt_tokens": r.prompt_tokens, "output_tokens": 50}
        for r in at_load(0.9, 60)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    line = ["--trace", str(trace), "--profile", "llama3-8b-a100", "--rate", "5"]
    for options in (["--systems", "fcfs,alise"], ["--what-if", "jct_s<=100"]):
        ended = CliRunner().invoke(app, [*line, *options, "--out", str(tmp_path)])
        assert ended.exit_code == 0, ended.output
        report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    answers = report["answers"]
    assert {answer["replicas"] for answer in answers} == {1}
    ended = CliRunner().invoke(app, [*line, "--systems", "lottery"])
    assert ended.exit_code == 1
    assert "no 'lottery'; allowed: fcfs" in ended.output


def test_the_table_writes_numbers_out_where_columns_are_narrow() -> None:
    metrics = metrics_of(simulate(FCFS, at_load(0.5, 10), PROFILE, sigma=0.0))
    metrics = replace(metrics, preemptions=30812.0)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(systems_table({"fcfs": metrics, "alise": replace(metrics, ttft_p99_s=5812.4)}))
    text = console.export_text()
    assert "30,812" in text
    assert "5,812" in text
    assert "…" not in text


def test_what_is_carried_has_the_latency_that_was_asked_for() -> None:
    def latency(rate_per_s: float) -> float:
        requests = poisson_requests(LENGTHS, rate_per_s, 200, 0)
        return metrics_of(simulate(FCFS, requests, PROFILE, sigma=0.8)).normalized_latency_s

    rate = load_carried(latency, 0.3, 0.1, 10.0)
    assert latency(rate) <= 0.3
    assert latency(1.02 * rate) > 0.3
    with pytest.raises(BenchError, match=r"--carry 0\.001: it is .* even at 0\.1 requests/s"):
        load_carried(latency, 0.001, 0.1, 10.0)


def test_a_saved_predictor_reads_the_requests_tokens(tmp_path: Path) -> None:
    items = [
        Item(str(i), str(i), tuple(range(5 + i)), tuple(range(1 + i)), Conversation("", (), ""))
        for i in range(20)
    ]
    requests = poisson_items(items, 5.0, 40, 0)
    seen: list[tuple[int, ...]] = []
    outputs: list[int] = []

    class Reading(NoisyPredictor):
        def track(self, prompt: PromptInput) -> Any:
            seen.append(tuple(prompt.token_ids))
            return super().track(prompt)

        def observe(self, job: Any, outcome: object) -> None:
            outputs.append(job.output_tokens)

    simulate(ALISE, requests, PROFILE, sigma=0.0, predictor=Reading(0.0, 0))
    assert sorted(seen) == sorted(tuple(r.prompt_ids) for r in requests)
    assert sorted(outputs) == sorted(r.output_tokens for r in requests)
    with pytest.raises(BenchError, match="no such folder"):
        SavedPredictor(tmp_path / "none", tmp_path / "table.npz")
