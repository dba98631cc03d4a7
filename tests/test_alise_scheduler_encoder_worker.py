"""The encoder's process: what comes back, what is dropped, and what its death costs."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from alise_scheduler import encoder_worker
from alise_scheduler.encoder_worker import EncoderWorker
from encoder_fixtures import Encoding, asked, encoder, encoder_file
from patience import eventually

# Answers each line with numbers that are its length; ends without an answer when told to.
_FAKE = """
import os, sys, time
import numpy as np
for line in sys.stdin.buffer:
    if b"die" in line:
        sys.exit(3)
    if b"stop talking" in line:
        os.close(1)
        time.sleep(600)
    sys.stdout.buffer.write(np.full(576, len(line), dtype=np.float32).tobytes())
    sys.stdout.buffer.flush()
"""


class Desk:
    """The thread of the test, to which a worker delivers; and what has come, by name."""

    def __init__(self, model: Path) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.worker = EncoderWorker(model, self._calls.put)
        self.came: dict[str, Encoding] = {}

    def submit(self, text: str) -> None:
        self.worker.submit(asked(text), lambda encoding: self.came.update({text: encoding}))

    def wait_for(self, text: str) -> None:
        while text not in self.came:
            self._calls.get(timeout=300)()

    def deliver_all(self) -> None:
        while not self._calls.empty():
            self._calls.get()()

    def process(self) -> subprocess.Popen[bytes]:
        return eventually(lambda: self.worker._process)

    def closes_at_once(self) -> bool:
        """Close the worker; returns whether that was quick, and nothing is left of it."""
        process, thread = self.process(), self.worker._thread
        assert thread is not None
        start_s = time.monotonic()
        self.worker.close()
        is_quick = time.monotonic() - start_s < 4.0
        return is_quick and process.returncode is not None and not thread.is_alive()


@contextmanager
def desk(model: Path) -> Iterator[Desk]:
    one = Desk(model)
    try:
        yield one
    finally:
        one.worker.close()


def start_fake_process(_: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _FAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.fixture
def fake_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_worker, "_start", start_fake_process)
    monkeypatch.setattr(encoder_worker, "_RESTART_PAUSE_S", 0.05)


def test_encodings_come_in_order_and_of_too_many_the_oldest_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder_worker, "MAX_PENDING", 8)
    with desk(encoder_file()) as one:
        one.submit("0")
        eventually(lambda: not one.worker._pending)  # its process is loading the model
        names = [str(n) for n in range(1, 14)]
        for name in names:
            one.submit(name)
        one.wait_for(names[-1])
        assert list(one.came) == ["0", *names[5:]]
        for name in ("0", names[-1]):
            expected = encoder().encode(asked(name))
            np.testing.assert_allclose(one.came[name], expected, rtol=1e-3, atol=1e-2)
        assert one.worker.take_counts() == {"encoded": 9, "dropped": 5}
        assert one.worker.take_counts() == {}


def test_closing_while_it_encodes_takes_no_time_and_what_waits_is_given_up() -> None:
    with desk(encoder_file()) as one:
        texts = [f"{n} " + "word " * 200 for n in range(40)]
        for text in texts:
            one.submit(text)
        one.wait_for(texts[0])
        # The process takes only time that nobody else wants.
        assert os.sched_getscheduler(one.process().pid) == os.SCHED_IDLE
        assert one.closes_at_once()
        one.submit("late")
    one.deliver_all()
    assert len(one.came) < len(texts)
    assert "late" not in one.came


def test_closing_while_the_model_is_loaded_takes_no_time() -> None:
    with desk(encoder_file()) as one:
        one.submit("a")
        assert one.closes_at_once()
    one.deliver_all()
    assert one.came == {}


def test_without_a_prompt_there_is_no_process() -> None:
    with desk(Path("none.gguf")) as one:
        time.sleep(0.1)
        assert (one.worker._process, one.worker._thread) == (None, None)


def test_a_killed_process_is_started_again_and_what_waits_is_encoded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoder_worker, "_RESTART_PAUSE_S", 0.05)
    with desk(encoder_file()) as one:
        one.submit("first")
        one.wait_for("first")
        killed = one.process()
        killed.kill()
        for name in ("on its way", "waits", "waits, too"):
            one.submit(name)
        one.wait_for("waits, too")
        # What the dead process had been given may be lost, nothing else.
        assert list(one.came)[-2:] == ["waits", "waits, too"]
        assert one.process().pid != killed.pid
    assert "its process ended with status -9; jobs keep their first estimates" in caplog.text


@pytest.mark.usefixtures("fake_process")
def test_prompts_that_kill_fake_processes_cost_only_themselves() -> None:
    with desk(Path("fake")) as one:
        for n in range(6):
            one.submit("die" if n % 2 else f"good {n}")
        one.wait_for("good 4")
        assert list(one.came) == ["good 0", "good 2", "good 4"]


@pytest.mark.usefixtures("fake_process")
def test_a_fake_process_that_lives_on_but_says_nothing_is_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with desk(Path("fake")) as one:
        one.submit("stop talking")
        silent = one.process()
        one.submit("b")
        one.wait_for("b")
        assert silent.returncode is not None
    assert "its process ended with status" in caplog.text


@pytest.mark.usefixtures("fake_process")
def test_during_the_pause_after_a_fake_process_died_prompts_wait_and_closing_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoder_worker, "_RESTART_PAUSE_S", 300.0)
    with desk(Path("fake")) as one:
        one.submit("die")
        eventually(lambda: "ended with status 3" in caplog.text)
        one.submit("waits")
        assert len(one.worker._pending) == 1
        assert one.closes_at_once()


def test_a_missing_model_is_a_warning_and_nobody_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), desk(tmp_path / "none.gguf") as one:
        one.submit("a")
        eventually(lambda: "prompt encoder: " in caplog.text)
        one.submit("b")
        assert one.closes_at_once()
        assert one.worker.take_counts() == {}
    assert one.came == {}
