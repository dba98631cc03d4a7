"""The API server shows what the engine's processes count, and itself counts in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, sys
from alise_engine import metric_files
from prometheus_client import REGISTRY, generate_latest, values

def engine():
    from alise_engine import metrics
    from alise_engine.kv_tier import metrics as tier_metrics
    metrics.LIVE_JOBS.set(3)
    tier_metrics.BYTES_MOVED.labels("store").inc(5)

if __name__ == "__main__":
    metric_files.collect()
    process = multiprocessing.get_context(sys.argv[1]).Process(target=engine)
    process.start()
    process.join()
    import alise_engine.kv_tier.metrics, alise_engine.metrics  # as vLLM's plug-in loading may do
    print(values.ValueClass.__name__)
    print(generate_latest(REGISTRY).decode())
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_engines_counts_are_shown_beside_own(tmp_path: Path, start_method: str) -> None:
    files = tmp_path / "files"
    files.mkdir()
    program = tmp_path / "api_server.py"
    program.write_text(PROGRAM)
    output = _run(program, start_method, {"ALISE_METRICS_FOLDER": str(files)})
    lines = output.splitlines()
    assert lines[0] == "MutexValue"
    live = [line for line in lines if line.startswith("alise_engine_live_jobs")]
    assert len(live) == 1
    assert live[0].endswith(" 3.0")
    assert 'alise_kv_tier_moved_bytes_total{direction="store"} 5.0' in lines
    assert any(line.startswith("process_start_time_seconds ") for line in lines)


def test_with_vllms_own_files_nothing_is_shown_twice(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    program = tmp_path / "api_server.py"
    program.write_text(PROGRAM)
    folders = {"ALISE_METRICS_FOLDER": str(files), "PROMETHEUS_MULTIPROC_DIR": str(files)}
    output = _run(program, "spawn", folders)
    assert output.startswith("MmapedValue\n")
    assert "alise_" not in output  # vLLM's own collector of that folder shows them


def _run(program: Path, start_method: str, folders: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, str(program), start_method],
        env={**os.environ, **folders},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout
