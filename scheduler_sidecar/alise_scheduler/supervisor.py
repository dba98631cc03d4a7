"""Keeps a sidecar running: `python -m alise_scheduler.supervisor [--watch-port PORT] COMMAND...`.

In a pod the container has to outlive the sidecar: while one of its containers is down, Kubernetes
counts a pod as not ready, and an engine that serves very well without predictions would get no
requests. For the same reason it finds out here that a sidecar hangs, and not by a liveness probe.
Imports little, as it stays in memory; of the command it knows only where it shows its metrics.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Final

_FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 30.0
_STABLE_S: Final = 30.0
_USAGE_ERROR: Final = 2

_HTTP_OK: Final = b" 200 "

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


@dataclass(frozen=True, slots=True)
class Watch:
    """Where a process shows its metrics, on 127.0.0.1, and when it counts as hanging."""

    port: int
    period_s: float = 20.0
    timeout_s: float = 10.0
    failures: int = 3
    """In a row, of a process that has answered before."""
    first_answer_s: float = 300.0
    """Loading its libraries and its model may take long on a machine that is busy."""

    def follow(self, pid: int, has_ended: threading.Event) -> None:
        """Kill the process once it hangs; returns then, or when it has ended."""
        started_s = time.monotonic()
        has_answered, failed = False, 0
        while not has_ended.wait(self.period_s):
            if self.answers():
                has_answered, failed = True, 0
                continue
            failed += 1
            silent_s = time.monotonic() - started_s
            hangs = failed >= self.failures if has_answered else silent_s > self.first_answer_s
            if hangs and not has_ended.is_set():
                _log.warning("process %d does not answer on port %d: killed", pid, self.port)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return

    def answers(self) -> bool:
        """Return whether the metrics can be had; waits for them as long as is allowed."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), self.timeout_s) as connection:
                connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                with connection.makefile("rb") as answer:
                    is_ok = _HTTP_OK in answer.readline(64)
                    while answer.read(1 << 16):
                        pass
                    return is_ok
        except OSError:
            return False


def keep_running(command: Sequence[str], watch: Watch | None = None) -> int:
    """Run `command`, again and again, until SIGTERM or SIGINT, which it gets too.

    One that hangs, by `watch`, is killed and started again, too. Returns its last status after a
    signal, and at once if it refuses its options: those do not become better. As process 1 of a
    container it also buries what its children leave behind.
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
        has_ended = threading.Event()
        if watch is not None:
            threading.Thread(
                target=watch.follow, args=(process.pid, has_ended), daemon=True
            ).start()
        process.returncode = status = _wait_for(process.pid)
        has_ended.set()
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


def _main() -> int:
    parser = argparse.ArgumentParser(prog="supervisor", description=__doc__)
    parser.add_argument("--watch-port", type=int, help="where the command serves /metrics")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command is needed")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    watch = Watch(arguments.watch_port) if arguments.watch_port else None
    return max(keep_running(arguments.command, watch), 0)


if __name__ == "__main__":
    sys.exit(_main())
