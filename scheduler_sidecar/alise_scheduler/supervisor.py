"""Keeps a sidecar running: `python -m alise_scheduler.supervisor COMMAND...`.

In a pod the container has to outlive the sidecar: while one of its containers is down, Kubernetes
counts a pod as not ready, and an engine that serves very well without predictions would get no
requests. Imports little, as it stays in memory; does not know what the command does.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Final

_FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 30.0
_STABLE_S: Final = 30.0
_USAGE_ERROR: Final = 2

_log = logging.getLogger("alise.supervisor")


@dataclass(slots=True)
class RestartPauses:
    """How long to wait before a process that has ended is started again: twice as long each time.

    One that ran for half a minute begins with the first pause again.
    """

    _pause_s: float = _FIRST_PAUSE_S

    def after(self, ran_s: float) -> float:
        """Return the pause, seconds, after the process ran for `ran_s`."""
        pause_s = _FIRST_PAUSE_S if ran_s > _STABLE_S else self._pause_s
        self._pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        return pause_s


def keep_running(command: Sequence[str]) -> int:
    """Run `command`, again and again, until SIGTERM or SIGINT, which it gets too.

    Returns its last status after a signal, and at once if it refuses its options: those do not
    become better. As process 1 of a container it also buries what its children leave behind.
    """
    stopping = threading.Event()
    process: subprocess.Popen[bytes] | None = None

    def on_signal(_: int, __: FrameType | None) -> None:
        stopping.set()
        if process is not None and process.returncode is None:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    pauses = RestartPauses()
    while True:
        started_s = time.monotonic()
        process = subprocess.Popen(command)
        if stopping.is_set():
            process.terminate()
        process.returncode = status = _wait_for(process.pid)
        if stopping.is_set() or status == _USAGE_ERROR:
            return status
        pause_s = pauses.after(time.monotonic() - started_s)
        _log.warning("%s ended with status %d; again in %g s", command[0], status, pause_s)
        if stopping.wait(pause_s):
            return status


def _wait_for(pid: int) -> int:
    while True:
        ended, status = os.wait()
        if ended == pid:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(max(keep_running(sys.argv[1:]), 0))
