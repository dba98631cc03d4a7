"""One server process: started, waited for, asked for its counters, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from alise_bench.errors import BenchError
from alise_bench.metrics import EngineCounts
from alise_bench.systems import Pace

START_TIMEOUT_S: Final = 600.0
SIDECAR_TIMEOUT_S: Final = 300.0
_GAUGE_TIMEOUT_S: Final = 15.0
_STOP_TIMEOUT_S: Final = 60.0
_LOG_TAIL_LINES: Final = 25


def free_port() -> int:
    """Return a TCP port of this host that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running_server(
    command: Sequence[str], environment: dict[str, str], port: int, log: Path
) -> Iterator[str]:
    """Start a server, yield its base URL once it is healthy, and end it with all its children.

    Raises `BenchError` with the log's tail if it dies or is not healthy in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, base_url, log)
        yield base_url
    finally:
        _stop(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], base_url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"a server ended with {process.returncode} at start; {_tail(log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{base_url}/health", timeout=5.0).status_code == httpx.codes.OK:
                return
        time.sleep(0.5)
    raise BenchError(f"a server was not ready within {START_TIMEOUT_S:.0f} s; {_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return f"its log {log} ends with:\n" + "\n".join(lines)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    # Whatever is left of its session (it is the leader), so that nothing outlives a run.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def engine_counts(base_url: str, pace: Pace | None = None) -> EngineCounts:
    """Return what the server, paced so, has counted since it started."""
    paced = json.loads(pace.counts_file.read_text(encoding="utf-8")) if pace else {}
    return EngineCounts(
        preemptions=int(_sample(base_url, "vllm:num_preemptions_total")),
        preempted_tokens=int(_sample(base_url, "alise_engine_preempted_tokens_total")),
        recomputed_tokens=int(_sample(base_url, "alise_engine_recomputed_tokens_total")),
        **paced,
    )


def wait_for_sidecar(base_url: str) -> None:
    """Wait until an ALISE engine has its stream to the sidecar: without it, it is FCFS.

    The first connect may take a while, as the engine makes its token table then. Raises
    `BenchError` if there is none in time.
    """
    deadline = time.monotonic() + SIDECAR_TIMEOUT_S
    while not is_sidecar_connected(base_url):
        if time.monotonic() > deadline:
            raise BenchError(f"no sidecar was connected within {SIDECAR_TIMEOUT_S:.0f} s")
        time.sleep(0.5)


def is_sidecar_connected(base_url: str) -> bool:
    """Return whether an ALISE engine has its stream to the sidecar now."""
    return _sample(base_url, "alise_engine_sidecar_connected") > 0


def has_trained_model(metrics_port: int) -> bool:
    """Return whether a sidecar, asked at its metrics page, predicts: without a model it cannot."""
    deadline = time.monotonic() + _GAUGE_TIMEOUT_S
    while time.monotonic() < deadline:
        if _sample(f"http://127.0.0.1:{metrics_port}", "alise_model_version") > 0:
            return True
        time.sleep(0.5)
    return False


def _sample(base_url: str, name: str) -> float:
    text = httpx.get(f"{base_url}/metrics", timeout=30.0).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )
