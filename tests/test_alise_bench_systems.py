"""What is started for each system, and what the load search does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from alise_bench.errors import BenchError
from alise_bench.load_search import find_rate
from alise_bench.settings import BenchSettings, Mode
from alise_bench.systems import Pace, ServerSettings, System, command, environment

SETTINGS = ServerSettings(Path("/m"), 16, 2048, 2, ("--seed", "1"), Path("/answers.npz"))


def line(system: System, settings: ServerSettings = SETTINGS) -> str:
    parts = command(
        system,
        settings,
        81,
        state_dir=Path("/state"),
        shared_dir=Path("/shared"),
        oracle_file=Path("/true.json"),
    )
    return " ".join(parts[1:])


@pytest.mark.parametrize("system", list(System), ids=lambda s: s.value)
def test_all_systems_have_the_same_vllm_options(system: System) -> None:
    for common in (
        "--max-num-seqs 16",
        "--max-model-len 2048",
        "--enforce-eager",
        "--seed 1",
        "--logits-processors alise_bench.replay:ReplayRecordedAnswers",
    ):
        assert common in line(system)


def test_each_system_gets_what_is_its_own() -> None:
    assert "--scheduling-policy priority" in line(System.PRIORITY_ORACLE)
    assert "--scheduling-policy" not in line(System.FCFS)
    assert "--alise-oracle-file /true.json" in line(System.ALISE_ORACLE)
    assert "--alise-kv-host-gib 0" in line(System.ALISE_RECOMPUTE)
    assert "--alise-kv-host-gib" not in line(System.ALISE)
    for system in System:
        assert ("--alise-state-dir" in line(system)) == (not system.is_stock)
        # Nobody who predicts is shown true lengths or answers.
        if system is not System.ALISE_ORACLE:
            assert "true.json" not in line(system)
        assert "answers.npz" not in line(system)


def test_environment_names_the_answers_in_recorded_mode_only() -> None:
    assert environment(SETTINGS, {})["ALISE_BENCH_REPLAY_FILE"] == "/answers.npz"
    natural = ServerSettings(Path("/m"), 16, 2048, 2)
    assert "ALISE_BENCH_REPLAY_FILE" not in environment(natural, {"A": "b"})
    assert environment(natural, {"A": "b"})["A"] == "b"


def test_a_pace_is_the_same_for_all_systems() -> None:
    paced = replace(SETTINGS, pace=Pace("smollm2-cpu", Path("/out/pace.json")))
    for system in System:
        assert "--worker-cls alise_bench.pace.PacedWorker" in line(system, paced)
        assert "--worker-cls" not in line(system)
    assert environment(paced, {})["ALISE_BENCH_PACE"] == "smollm2-cpu"
    assert environment(paced, {})["ALISE_BENCH_PACE_COUNTS"] == "/out/pace.json"
    assert "ALISE_BENCH_PACE" not in environment(SETTINGS, {})


@pytest.mark.parametrize("capacity", [0.4, 1.0, 3.0])
def test_load_search_finds_three_times_unloaded(capacity: float) -> None:
    def latency_ratio(rate: float) -> float:  # of a short run: no pole at the capacity
        return 1.0 + 2.0 * math.exp(6 * (rate / capacity - 1.1))

    rate, probes = find_rate(3.0, capacity, latency_ratio, max_probes=6)
    assert latency_ratio(rate) == pytest.approx(3.0, rel=0.2)
    assert 1 < len(probes) <= 6


def test_load_search_goes_down_too() -> None:
    rate, _ = find_rate(3.0, 5.0, lambda r: 1.0 + r**2, max_probes=8)
    assert rate == pytest.approx(math.sqrt(2.0), rel=0.2)


def test_settings_say_what_is_wrong(tmp_path: Path) -> None:
    def make(**changed: object) -> BenchSettings:
        values: dict[str, object] = {
            "out": tmp_path,
            "model": tmp_path,
            "dataset": tmp_path,
            "mode": Mode.NATURAL,
            "systems": (System.FCFS,),
            "requests": 4,
            "repeats": 1,
            "rates_per_s": (1.0,),
            "auto_load": None,
            "load_share": 1.0,
            "trace": None,
            "seed": 0,
            "slots": 4,
            "max_tokens": 64,
            "max_model_len": 128,
            "kv_cache_gib": 1,
            "warmup": 0,
            "unloaded_requests": 1,
        }
        return BenchSettings(**{**values, **changed})  # type: ignore[arg-type]

    assert make().as_plan()["requests"] == 4
    for name, value, message in [
        ("systems", (System.FCFS, System.FCFS), "each system once"),
        ("rates_per_s", (1.0, -1.0), "above 0"),
        ("auto_load", 1.0, "above 1"),
        ("max_tokens", 128, "no room for a prompt"),
    ]:
        with pytest.raises(BenchError, match=message):
            make(**{name: value})
