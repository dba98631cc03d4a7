"""`alise top` against a real sidecar's page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alise_scheduler.top import app
from alise_scheduler.top_view import duration
from live_server import free_port
from scheduler_fakes import FakePredictor, progress
from status_harness import sidecar_page
from typer.testing import CliRunner

WIDE = {"COLUMNS": "160", "TERM": "dumb"}


def top(*arguments: str):
    return CliRunner(env=WIDE).invoke(app, list(arguments))


def test_it_shows_who_runs_and_who_waits(tmp_path: Path) -> None:
    with sidecar_page(tmp_path, FakePredictor(3)) as engine:
        engine.connect(slots=4)
        engine.crowd(100)
        while "4 of 4" not in (shown := top("--url", engine.url, "--once")).stdout:
            assert shown.exit_code == 0
        assert "waiting 96" in shown.stdout
        assert "50 of 100 jobs" in shown.stdout
        assert "model 3" in shown.stdout
        one = top("--url", engine.url, "--once", "--search", "00001").stdout.splitlines()
        (line,) = [row for row in one if row.lstrip().startswith("00001")]
        assert "running" in line
        queue = top("--url", engine.url, "--once", "--show", "queued", "--limit", "2")
        assert "2 of 96 jobs" in queue.stdout


def test_json_is_the_document(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        engine.connect()
        engine.send(engine.arrive("[bold]a[/]"), progress("[bold]a[/]", 3))
        while not (jobs := json.loads(top("--url", engine.url, "--json").stdout)["jobs"])[
            "running"
        ]:
            pass
        assert jobs["rows"][0]["output_tokens"] == 3
        # An id is text and no markup.
        assert "[bold]a[/]" in top("--url", engine.url, "--once").stdout


@pytest.mark.parametrize("path", ["", "/elsewhere"])
def test_no_sidecar_is_told_with_what_to_do(tmp_path: Path, path: str) -> None:
    done = top("--url", f"http://127.0.0.1:{free_port()}{path}", "--once")
    assert done.exit_code == 1
    assert "Connection refused" in done.stderr
    assert "--url" in done.stderr
    assert "ALISE_STATUS_URL" in done.stderr
    assert "--metrics-port" in done.stderr


def test_a_page_that_is_another_is_told(tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        done = top("--url", engine.url + "/metrics", "--once")
    assert done.exit_code == 1
    assert "Error: no status from" in done.stderr


def test_a_url_must_be_one() -> None:
    done = top("--url", "file:///etc/passwd", "--once")
    assert done.exit_code == 2
    assert "allowed are http://" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.04, "0.0s"), (9.96, "10.0s"), (64, "64s"), (125, "2m05s"), (7260, "2h01m")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown
