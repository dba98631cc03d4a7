"""Encoding prompts in a process of its own, which takes only what time nobody else wants.

An encoding takes tens of milliseconds of a core: too long for the process that answers engines, and
for an arrival, which is placed by look-ups at once and again when its encoding has come. The worker
gets one line of JSON for each prompt on stdin, answers with the encoding's bytes on stdout, and
ends when stdin does.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from alise_scheduler.prompt_encoder import ENCODING_WIDTH, Array, Message, PromptEncoder

MAX_PENDING: Final = 64
"""Prompts that wait to be encoded; above it the oldest keep the estimate that they have."""
_RESTART_PAUSE_S: Final = 30.0  # twice as long after each further failure in a row ...
_LONGEST_PAUSE_S: Final = 3600.0  # ... so that one that cannot start does not fill the log
_LOWEST_PRIORITY: Final = 19
_ENCODING_BYTES: Final = 4 * ENCODING_WIDTH

_log = logging.getLogger(__name__)

Then: TypeAlias = Callable[[Array], None]


class EncoderWorker:
    """Encodes prompts one after the other; started by the first of them.

    `deliver` runs what it is given on the caller's own thread, such as an event loop's
    `call_soon_threadsafe`.
    """

    def __init__(self, model: Path, deliver: Callable[[Callable[[], None]], object]) -> None:
        self._model = model
        self._deliver = deliver
        self._tally: Tally[str] = Tally()
        self._pending: deque[tuple[list[Message], Then]] = deque()
        self._wake = threading.Condition()
        self._pause_s = _RESTART_PAUSE_S
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def submit(self, messages: list[Message], then: Then) -> None:
        """Have `then` called with the encoding of `messages`, if there is time for it."""
        with self._wake:
            if self._is_closed:
                return
            self._pending.append((messages, then))
            if len(self._pending) > MAX_PENDING:
                self._pending.popleft()
                self._tally["dropped"] += 1
            self._wake.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
            self._thread.start()

    def take_counts(self) -> Tally[str]:
        """Return how many prompts were "encoded" and "dropped" since the last call."""
        with self._wake:
            taken, self._tally = self._tally, Tally()
        return taken

    def close(self) -> None:
        """Stop; prompts that wait are given up."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._process is not None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._serve()
            except (OSError, ValueError) as error:
                if not self._is_closed:
                    _log.warning("prompt encoder: %s; jobs keep their first estimates", error)
            with self._wake:
                if not self._is_closed:
                    self._wake.wait_for(lambda: self._is_closed, timeout=self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _serve(self) -> None:
        with _start(self._model) as process:
            self._process = process
            try:
                while (taken := self._take()) is not None:
                    messages, then = taken
                    encoding = _ask(process, messages)
                    self._pause_s = _RESTART_PAUSE_S
                    with self._wake:
                        self._tally["encoded"] += 1
                    self._deliver(partial(then, encoding))
            finally:
                process.kill()

    def _take(self) -> tuple[list[Message], Then] | None:
        with self._wake:
            self._wake.wait_for(lambda: self._is_closed or bool(self._pending))
            return None if self._is_closed else self._pending.popleft()


def _start(model: Path) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-m", "alise_scheduler.encoder_worker", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **threads, "PYTHONPATH": path},
    )


def _ask(process: subprocess.Popen[bytes], messages: Sequence[Message]) -> Array:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(messages).encode() + b"\n")
    process.stdin.flush()
    answer = process.stdout.read(_ENCODING_BYTES)
    if len(answer) < _ENCODING_BYTES:
        process.kill()  # one that lives on would not answer the next prompt either
        raise ValueError(f"its process ended with status {process.wait()}")
    return np.frombuffer(answer, dtype=np.float32)


def _main() -> None:
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):  # a sandbox may forbid even that
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    elif hasattr(os, "nice"):
        os.nice(_LOWEST_PRIORITY)
    encoder = PromptEncoder(Path(sys.argv[1]))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(encoder.encode(json.loads(line)).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
