"""`alise serve`: a vLLM server with our plug-ins, and a scheduler sidecar beside it.

Supervises both: a sidecar that dies is restarted while the engine goes on; when the engine ends,
all ends with its exit status; SIGTERM drains.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from alise_scheduler.supervisor import RestartPauses

from alise_engine.draining import DRAIN_FILE
from alise_engine.kv_tier.layout import Quantization
from alise_engine.metric_files import METRICS_FOLDER
from alise_engine.processes import spawn, stop
from alise_engine.progress import StartDisplay
from alise_engine.vllm_arguments import ServerAddress

logger = logging.getLogger("alise.serve")

SCHEDULER_CLASS = "alise_engine.scheduler.AliseScheduler"
SIDECAR_READY_S = 20.0
_POLL_S = 0.2
_LAST_REQUESTS_S = 0.5
"""From turning requests away to the engine's drain: those let in just before get to the engine."""
_STOP_GRACE_S = 15.0
_SIDECAR_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class ServePlan:
    """Everything that `alise serve` starts, decided before anything is started."""

    model_name: str
    engine_command: Sequence[str]
    engine_environment: Mapping[str, str]
    sidecar_command: Sequence[str] | None
    """None: the sidecar runs elsewhere."""
    sidecar_socket: Path | None
    server: ServerAddress
    status_url: str | None
    """The sidecar's status page, if this plan starts one that has it."""
    drain_s: float


@dataclass(slots=True)
class _Sidecar:
    """The sidecar's process, restarted with growing pauses."""

    command: Sequence[str]
    process: subprocess.Popen[bytes]
    pauses: RestartPauses = field(default_factory=RestartPauses)
    started_s: float = field(default_factory=time.monotonic)
    restart_at_s: float | None = None

    def tend(self) -> None:
        """Notice a dead process and start it again when its pause is over."""
        now_s = time.monotonic()
        if self.restart_at_s is not None:
            if now_s >= self.restart_at_s:
                self.process, self.started_s = spawn(self.command, os.environ), now_s
                self.restart_at_s = None
        elif (status := self.process.poll()) is not None:
            pause_s = self.pauses.after(now_s - self.started_s)
            logger.warning(
                "The scheduler sidecar ended (status %d); the engine goes on in order of arrival. "
                "Restarting it in %.1f s",
                status,
                pause_s,
            )
            self.restart_at_s = now_s + pause_s


class Launcher:
    """Runs a `ServePlan` until the engine ends or a signal asks for it."""

    def __init__(self, plan: ServePlan) -> None:
        self._plan = plan
        self._signal: int | None = None

    def run(self) -> int:
        """Serve; return the engine's exit status, 0 after a signal."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        sidecar: _Sidecar | None = None
        engine: subprocess.Popen[bytes] | None = None
        with tempfile.TemporaryDirectory(prefix="alise-run-") as folder:
            drain_file = Path(folder) / "draining"
            try:
                with StartDisplay() as display:
                    sidecar = self._start_sidecar(display)
                    engine = self._start_engine(display, Path(folder), drain_file)
                    is_ready = self._wait_until_ready(engine, sidecar, display)
                    if not is_ready and self._signal is None:
                        display.failed()
                while self._signal is None and engine.poll() is None:
                    if sidecar is not None:
                        sidecar.tend()
                    time.sleep(_POLL_S)
            finally:
                status = self._stop(engine, sidecar, drain_file)
        return 0 if self._signal is not None else status

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def _start_sidecar(self, display: StartDisplay) -> _Sidecar | None:
        command, socket = self._plan.sidecar_command, self._plan.sidecar_socket
        if command is None:
            return None
        display.phase("starting the scheduler sidecar")
        sidecar = _Sidecar(command, spawn(command, os.environ))
        deadline_s = time.monotonic() + SIDECAR_READY_S
        while socket is not None and not socket.exists() and time.monotonic() < deadline_s:
            if self._signal is not None or sidecar.process.poll() is not None:
                break  # a sidecar that can't start is restarted later; the engine needs none
            time.sleep(_POLL_S)
        return sidecar

    def _start_engine(
        self, display: StartDisplay, folder: Path, drain_file: Path
    ) -> subprocess.Popen[bytes]:
        display.phase(f"loading {self._plan.model_name}")
        environment = {
            **self._plan.engine_environment,
            METRICS_FOLDER: str(folder),
            DRAIN_FILE: str(drain_file),
        }
        engine = spawn(self._plan.engine_command, environment, stdout=subprocess.PIPE)
        assert engine.stdout is not None
        display.follow(engine.stdout)
        return engine

    def _wait_until_ready(
        self,
        engine: subprocess.Popen[bytes],
        sidecar: _Sidecar | None,
        display: StartDisplay,
    ) -> bool:
        server = self._plan.server
        while self._signal is None and engine.poll() is None:
            if sidecar is not None:
                sidecar.tend()
            if server.is_healthy():
                page = self._plan.status_url
                text = f"ready. Try it:\n\n{server.curl(self._plan.model_name)}\n"
                if page:
                    text += f"\nWhat it is doing: {page} (or: alise top)\n"
                display.done(text)
                return True
            time.sleep(_POLL_S)
        return False

    def _stop(
        self,
        engine: subprocess.Popen[bytes] | None,
        sidecar: _Sidecar | None,
        drain_file: Path,
    ) -> int:
        status = 1
        if engine is not None:
            if engine.poll() is None:
                logger.info("Draining: up to %.0f s for answers in progress", self._plan.drain_s)
                drain_file.touch()
                time.sleep(_LAST_REQUESTS_S)
            status = stop(engine, self._plan.drain_s + _STOP_GRACE_S)
        if sidecar is not None:
            stop(sidecar.process, _SIDECAR_STOP_S)
        return status


def kv_transfer_config(host_bytes: int, quantization: Quantization) -> str:
    """Return the value of vLLM's `--kv-transfer-config` that puts the KV tier behind an engine."""
    return json.dumps(
        {
            "kv_connector": "AliseOffloadingConnector",
            "kv_connector_module_path": "alise_engine.kv_tier.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "host_bytes": host_bytes,
                "quantization": quantization.value,
            },
        }
    )


def vllm_command(arguments: Sequence[str]) -> list[str]:
    """Return the command of `vllm serve` with this interpreter."""
    return [sys.executable, "-m", "alise_engine.vllm_main", "serve", *arguments]
