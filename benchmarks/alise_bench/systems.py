"""The systems under test, as command lines and environments. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from alise_engine.default_model import has_fast_bfloat16
from alise_engine.vllm_arguments import has_option

from alise_bench.replay_table import REPLAY_FILE_VARIABLE


class System(str, Enum):
    """What is compared, by the names that users give on the command line."""

    FCFS = "fcfs"
    """Stock `vllm serve`."""
    PRIORITY_ORACLE = "priority-oracle"
    """Stock vLLM's priority scheduling, told the true output lengths by the client."""
    ALISE = "alise"
    """`alise serve` with predictions."""
    ALISE_RECOMPUTE = "alise-recompute"
    """The same without the KV tier: preempted jobs are computed again."""
    ALISE_ORACLE = "alise-oracle"
    """`alise serve` with the true lengths instead of predictions."""

    @property
    def is_stock(self) -> bool:
        """Return whether this is vLLM without ALISE."""
        return self in (System.FCFS, System.PRIORITY_ORACLE)

    @property
    def is_predicting(self) -> bool:
        """Return whether its sidecar predicts."""
        return self in (System.ALISE, System.ALISE_RECOMPUTE)


PACE_VARIABLE = "ALISE_BENCH_PACE"
"""Names the profile of a paced engine (`alise_bench.pace`)."""

PACE_COUNTS_VARIABLE = "ALISE_BENCH_PACE_COUNTS"
"""Names the file in which it says how well it holds the pace."""

SERVED_NAME = "bench"
"""The model's name in requests, the same for all systems."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How an engine is paced."""

    profile: str
    """By name or file: whose step times are kept."""
    counts_file: Path
    """Where the engine says how well it keeps them (absolute)."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What all servers of one benchmark have in common."""

    model: Path
    slots: int
    """Sequences that run at once (`--max-num-seqs`)."""
    max_model_len: int
    kv_cache_gib: int
    vllm_options: tuple[str, ...] = ()
    replay_file: Path | None = None
    """Recorded mode: the answers."""
    pace: Pace | None = None


def command(
    system: System,
    settings: ServerSettings,
    port: int,
    *,
    state_dir: Path | None = None,
    shared_dir: Path | None = None,
    metrics_port: int = 0,
    oracle_file: Path | None = None,
    alise_options: tuple[str, ...] = (),
) -> list[str]:
    """Return the command line of one server.

    For the ALISE systems: `state_dir` (the sidecar's learned state), `shared_dir` (of engine and
    sidecar) and `metrics_port` (the sidecar's; 0: none). For `alise-oracle` alone: `oracle_file`
    (true lengths by prompt key).
    """
    # `vllm serve`, as `alise serve` itself starts it: the module only answers vLLM's question for
    # its own version, which fails in the CPU build.
    stock = ["alise_engine.vllm_main", "serve"]
    program = stock if system.is_stock else ["alise_scheduler", "serve"]
    line = [sys.executable, "-m", *program, str(settings.model)]
    line += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME]
    line += ["--max-num-seqs", str(settings.slots), "--max-model-len", str(settings.max_model_len)]
    line += ["--enforce-eager", *settings.vllm_options]
    if not has_option(settings.vllm_options, "--dtype") and not has_fast_bfloat16():
        line += ["--dtype", "float32"]
    if settings.replay_file is not None:
        line += ["--logits-processors", "alise_bench.replay:ReplayRecordedAnswers"]
    if settings.pace is not None:
        line += ["--worker-cls", "alise_bench.pace.PacedWorker"]
    if system is System.PRIORITY_ORACLE:
        line += ["--scheduling-policy", "priority"]
    if not system.is_stock:
        assert state_dir is not None, "an ALISE system has a state folder"
        assert shared_dir is not None, "and one that it shares with its sidecar"
        line += ["--alise-state-dir", str(state_dir), "--alise-shared-dir", str(shared_dir)]
        line += ["--alise-metrics-port", str(metrics_port), *alise_options]
    if system is System.ALISE_RECOMPUTE:
        line += ["--alise-kv-host-gib", "0"]
    if system is System.ALISE_ORACLE:
        assert oracle_file is not None, "alise-oracle has a file of true lengths"
        line += ["--alise-oracle-file", str(oracle_file)]
    return line


def python_path() -> str:
    """Return the PYTHONPATH with which a child imports what this process can.

    Empty where the packages are installed; else where their sources are.
    """
    installed = (sys.prefix, sys.base_prefix)
    return os.pathsep.join(p for p in sys.path if p and not p.startswith(installed))


def environment(settings: ServerSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a server."""
    ours = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "PYTHONPATH": python_path(),
    }
    if settings.replay_file is not None:
        ours[REPLAY_FILE_VARIABLE] = str(settings.replay_file)
    if settings.pace is not None:
        ours[PACE_VARIABLE] = settings.pace.profile
        ours[PACE_COUNTS_VARIABLE] = str(settings.pace.counts_file)
    return {**inherited, **ours}
