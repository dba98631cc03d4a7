"""The supervisor, with real processes: who dies is started again, who is asked to end ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from alise_scheduler.supervisor import RestartPauses, Watch
from live_server import free_port
from patience import eventually

# Notes its process id, then does what it is told.
_PROGRAM = """
import os, signal, sys, time
if sys.argv[2] == "fail":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it fails as it would, when asked to end, too
with open(sys.argv[1], "a") as file:
    print(os.getpid(), file=file)
if sys.argv[2] == "fail":
    sys.exit(int(sys.argv[3]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(60)
"""


# Notes its process id, and shows metrics, as long as there is no file that tells it to hang.
_PAGE = """
import http.server, os, pathlib, sys, time
notes, port, hang = sys.argv[1:]
with open(notes, "a") as file:
    print(os.getpid(), file=file)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while pathlib.Path(hang).exists():
            time.sleep(0.05)
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        pathlib.Path(notes + ".answers").open("a").write("x")
if port == "none":
    time.sleep(60)
http.server.HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""
# As the module itself, with less patience.
_WATCHED = """
import sys
from alise_scheduler.supervisor import Watch, keep_running
watch = Watch(int(sys.argv[1]), period_s=0.2, timeout_s=3.0, first_answer_s=float(sys.argv[2]))
sys.exit(keep_running(sys.argv[3:], watch))
"""


def supervised(notes: Path, *words: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    program = [sys.executable, "-c", _PROGRAM, str(notes), *words]
    return running([sys.executable, "-m", "alise_scheduler.supervisor", *program])


@contextmanager
def running(line: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(line)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def started(notes: Path) -> list[int]:
    return [int(line) for line in notes.read_text().split()] if notes.exists() else []


def test_a_command_that_dies_is_started_again(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with supervised(notes, "serve") as process:
        (first,) = eventually(lambda: started(notes))
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(started(notes)) > 1)
        assert process.poll() is None
        process.terminate()
        assert process.wait(120) == 0
        assert not Path(f"/proc/{started(notes)[-1]}").exists()


def test_failures_are_tried_again_and_the_end_is_heard_in_a_pause(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with supervised(notes, "fail", "1") as process:
        eventually(lambda: len(started(notes)) > 1)
        process.terminate()
        assert process.wait(120) == 1


def test_refused_options_are_not_tried_again(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with supervised(notes, "fail", "2") as process:
        assert process.wait(120) == 2
        assert len(started(notes)) == 1


@pytest.mark.parametrize("has_answered", [True, False])
def test_a_command_that_hangs_is_started_again(has_answered: bool, tmp_path: Path) -> None:
    notes, hang, port = tmp_path / "notes", tmp_path / "hang", str(free_port())
    first_answer_s = "60" if has_answered else "1"
    watched = [sys.executable, "-c", _WATCHED, port, first_answer_s]
    page = [sys.executable, "-c", _PAGE, str(notes), port if has_answered else "none", str(hang)]
    with running([*watched, *page]) as process:
        if has_answered:
            answers = tmp_path / "notes.answers"
            eventually(lambda: answers.exists() and len(answers.read_text()) > 5)
            assert len(started(notes)) == 1  # one that answers is left alone
            hang.touch()
        eventually(lambda: len(started(notes)) > 1)
        hang.unlink(missing_ok=True)
        assert not Path(f"/proc/{started(notes)[0]}").exists()
        process.terminate()
        assert process.wait(120) == -signal.SIGTERM % 256


def test_the_page_of_the_sidecar_itself_is_an_answer(tmp_path: Path) -> None:
    port = free_port()
    watch = Watch(port)
    supervisor = [sys.executable, "-m", "alise_scheduler.supervisor", "--watch-port", str(port)]
    sidecar = [sys.executable, "-m", "alise_scheduler", "scheduler", "--metrics-port", str(port)]
    options = ["--listen", f"unix:{tmp_path}/s.sock", "--state-dir", str(tmp_path / "state")]
    with running([*supervisor, *sidecar, *options]) as process:
        assert not watch.answers()
        eventually(watch.answers)
        process.terminate()
        assert process.wait(120) == 0


def test_pauses_grow_to_half_a_minute_and_begin_again_after_a_good_run() -> None:
    pauses = RestartPauses()
    assert [pauses.after(0.1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [pauses.after(31.0), pauses.after(0.1)] == [0.5, 1.0]
