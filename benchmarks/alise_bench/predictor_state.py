"""The predictor of a repeat: trained beforehand on other prompts, copied fresh for each run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from alise_bench.dataset import Split, write_training_file
from alise_bench.errors import BenchError
from alise_bench.session import Session
from alise_bench.store import trained_state
from alise_bench.systems import environment

_TRAIN_TIMEOUT_S: Final = 900


def fresh_state(session: Session, split: Split, repeat: int) -> Path:
    """Return a copy of the state trained for this repeat: a run's online learning stays its own."""
    trained = trained_state(session.out, repeat).resolve()
    if not trained.exists():
        _train(session, split, trained)
    copy = Path(tempfile.mkdtemp(prefix="alise-bench-state-"))
    shutil.copytree(trained, copy, dirs_exist_ok=True)
    return copy


def _train(session: Session, split: Split, trained: Path) -> None:
    session.progress.step(f"training the predictor on {len(split.train)} other prompts")
    staging = trained.with_suffix(".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    file = trained.with_suffix(".jsonl")
    write_training_file(split.train, file)
    line = [sys.executable, "-m", "alise_scheduler", "predictor", "train", str(file)]
    line += ["--model", str(session.settings.model), "--state-dir", str(staging)]
    done = subprocess.run(
        line,
        env=environment(session.servers, os.environ),
        capture_output=True,
        text=True,
        timeout=_TRAIN_TIMEOUT_S,
        check=False,
    )
    trained.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise BenchError(f"`alise predictor train` failed:\n{done.stderr[-2000:]}")
    staging.rename(trained)
