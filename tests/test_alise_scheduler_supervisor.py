"""The supervisor, with real processes: who dies is started again, who is asked to end ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alise_scheduler.supervisor import RestartPauses
from patience import eventually

# Notes its process id, then does what it is told.
_PROGRAM = """
import os, signal, sys, time
with open(sys.argv[1], "a") as file:
    print(os.getpid(), file=file)
if sys.argv[2] == "fail":
    sys.exit(int(sys.argv[3]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(60)
"""


@contextmanager
def supervised(notes: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    line = [sys.executable, "-m", "alise_scheduler.supervisor"]
    line += [sys.executable, "-c", _PROGRAM, str(notes), *words]
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
        assert process.wait(20) == 0
        assert not Path(f"/proc/{started(notes)[-1]}").exists()


def test_failures_are_tried_again_and_the_end_is_heard_in_a_pause(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with supervised(notes, "fail", "1") as process:
        eventually(lambda: len(started(notes)) > 1)
        process.terminate()
        assert process.wait(20) == 1


def test_refused_options_are_not_tried_again(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with supervised(notes, "fail", "2") as process:
        assert process.wait(20) == 2
        assert len(started(notes)) == 1


def test_pauses_grow_to_half_a_minute_and_begin_again_after_a_good_run() -> None:
    pauses = RestartPauses()
    assert [pauses.after(0.1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [pauses.after(31.0), pauses.after(0.1)] == [0.5, 1.0]
