"""`alise operator`: the command line as users see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from operator_fixtures import ROOT

pytest.importorskip("kopf", reason="needs the extra 'operator'")

ALISE = [sys.executable, "-m", "alise_scheduler", "operator"]


def alise(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in ("scheduler_sidecar", "operator"))
    shown = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": path}
    return subprocess.run(
        [*ALISE, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **shown, **environment},
        timeout=60,
    )


def test_help_lists_the_commands_and_their_options() -> None:
    assert {"run", "crd", "reference"} <= set(alise("--help").stdout.split())
    options = alise("run", "--help").stdout
    for name in ("--namespace", "--peering", "--engine-image", "--audit-s", "--log-format"):
        assert name in options


def test_the_crd_is_printed_as_it_is_in_the_repository() -> None:
    (path,) = (ROOT / "crds").glob("*.yaml")
    assert alise("crd").stdout == path.read_text()


def test_a_wrong_option_is_named() -> None:
    done = alise("run", "--workers", "0")
    assert done.returncode == 2
    assert "--workers" in done.stderr


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "kopf.py").write_text("raise ModuleNotFoundError(name='kopf')\n")
    path = os.pathsep.join(
        [str(tmp_path), *(str(ROOT / part) for part in ("scheduler_sidecar", "operator"))]
    )
    done = alise("run", PYTHONPATH=path)
    assert done.returncode == 2
    assert "pip install 'alise[operator]'" in done.stderr


def test_the_operator_loads_neither_engine_nor_predictor() -> None:
    code = "import alise_operator.cli, sys; print(*sys.modules)"
    path = os.pathsep.join(str(ROOT / part) for part in ("scheduler_sidecar", "operator"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        timeout=60,
    )
    assert not {"torch", "numpy", "vllm", "grpc", "xgboost"} & set(done.stdout.split())
