"""Training in a process of its own: it shares neither the interpreter lock nor a core's priority.

A thread would do neither: at low priority it keeps the interpreter lock while other processes
run, and predictions wait for it. The worker gets encoded samples and the current models on
stdin, answers with the new models on stdout, and ends.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from alise_scheduler.model_blob import models_from_bytes, models_to_bytes
from alise_scheduler.sample_blob import EncodedSample, decode
from alise_scheduler.trainer import Trained, improve
from alise_scheduler.training import Models

_SAMPLE: Final = struct.Struct("<IIB")  # bytes of features, output tokens, is censored
_LOWEST_PRIORITY: Final = 19


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """All that a training needs."""

    samples: Sequence[EncodedSample]
    seen: int
    current: Models | None
    trained: Trained
    now_unix_s: float


class TrainWorkerError(RuntimeError):
    """The worker died or talked nonsense."""


def train_here(request: TrainRequest) -> tuple[Models, Trained] | None:
    """Train in this process; see `trainer.improve`."""
    return improve(
        [decode(sample) for sample in request.samples],
        request.seen,
        request.current,
        request.trained,
        request.now_unix_s,
        np.random.default_rng(request.seen),
    )


def start_worker() -> subprocess.Popen[bytes]:
    """Start a worker; it waits for its request."""
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-m", "alise_scheduler.train_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **threads, "PYTHONPATH": path},
    )


def train_in_worker(
    worker: subprocess.Popen[bytes], request: TrainRequest
) -> tuple[Models, Trained] | None:
    """Send `request` to `worker` and wait for its answer.

    Raises:
        TrainWorkerError: no valid answer; the worker may have been killed.
    """
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        with worker.stdin as pipe:
            _send(pipe, request)
        header = json.loads(worker.stdout.readline() or b"null")
        blob = worker.stdout.read()
    except (OSError, ValueError) as error:
        raise TrainWorkerError(f"training process failed: {error}") from error
    finally:
        worker.stdout.close()
        worker.wait()
    if worker.returncode != 0 or header is None:
        raise TrainWorkerError(f"training process ended with status {worker.returncode}")
    if not header:
        return None
    return models_from_bytes(blob), Trained(**header)


def _send(pipe: IO[bytes], request: TrainRequest) -> None:
    model = models_to_bytes(request.current) if request.current else b""
    header: dict[str, Any] = {
        "seen": request.seen,
        "trained": asdict(request.trained),
        "now_unix_s": request.now_unix_s,
        "model_bytes": len(model),
    }
    pipe.write(json.dumps(header).encode() + b"\n" + model)
    for sample in request.samples:
        pipe.write(_SAMPLE.pack(len(sample.features), sample.output_tokens, sample.is_censored))
        pipe.write(sample.features)


def _receive(pipe: IO[bytes]) -> TrainRequest:
    header = json.loads(pipe.readline())
    model = pipe.read(header["model_bytes"])
    samples = []
    while prefix := pipe.read(_SAMPLE.size):
        size, output_tokens, is_censored = _SAMPLE.unpack(prefix)
        samples.append(EncodedSample(pipe.read(size), output_tokens, bool(is_censored)))
    return TrainRequest(
        samples=samples,
        seen=header["seen"],
        current=models_from_bytes(model) if model else None,
        trained=Trained(**header["trained"]),
        now_unix_s=header["now_unix_s"],
    )


def _main() -> None:
    if hasattr(os, "nice"):
        os.nice(_LOWEST_PRIORITY)
    fitted = train_here(_receive(sys.stdin.buffer))
    out = sys.stdout.buffer
    if fitted is None:
        out.write(b"{}\n")
    else:
        models, trained = fitted
        out.write(json.dumps(asdict(trained)).encode() + b"\n" + models_to_bytes(models))
    out.flush()


if __name__ == "__main__":
    _main()
