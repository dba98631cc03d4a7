"""What `schedule()` costs per step, ours against stock vLLM's, by the number of waiting jobs.

In process and without a model, but with a real sidecar beside it that ranks every job by a known
length. Between steps there is a pause, as when a model runs: the stream's threads work then.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import numpy as np
from alise_engine.scheduler import AliseScheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from alise_bench.errors import BenchError
from alise_bench.keys import key_of
from alise_bench.scheduler_setup import answer, build_request, build_scheduler, prompt_of
from alise_bench.systems import python_path

_PAUSE_S: Final = 0.01
_ROUNDS: Final = 5
_STEPS_PER_FINISH: Final = 5
_SETTLE_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Overhead:
    """`schedule()` per step, milliseconds, with `waiting` jobs queued and all slots busy."""

    slots: int
    waiting: int
    stock_median_ms: float
    ours_median_ms: float
    stock_mean_ms: float
    ours_mean_ms: float

    @property
    def median_overhead_ms(self) -> float:
        """Return ours - stock, medians over steps."""
        return self.ours_median_ms - self.stock_median_ms

    @property
    def mean_overhead_ms(self) -> float:
        """Return ours - stock, means over steps: what happens now and then counts too."""
        return self.ours_mean_ms - self.stock_mean_ms


class _Line:
    """A scheduler kept at a constant number of waiting jobs, one job ending now and then."""

    def __init__(self, scheduler: Any, slots: int, waiting: int) -> None:
        self.scheduler = scheduler
        self._numbers = itertools.count()
        self._steps = 0
        for _ in range(slots + waiting):
            self._add()

    def _add(self) -> None:
        self.scheduler.add_request(build_request(next(self._numbers)))

    def step(self) -> float:
        """Run one step; return the duration of `schedule()`, seconds.

        With it `get_grammar_bitmask()`: ours does there, beside the model, what can wait.
        """
        self._steps += 1
        begin = time.perf_counter()
        output = self.scheduler.schedule()
        self.scheduler.get_grammar_bitmask(output)
        duration = time.perf_counter() - begin
        ending = set()
        if self._steps % _STEPS_PER_FINISH == 0 and self.scheduler.running:
            ending.add(self.scheduler.running[0].request_id)
        answer(self.scheduler, output, ending)
        for _ in ending:
            self._add()
        time.sleep(_PAUSE_S)
        return duration

    def settle(self) -> None:
        """Step until the sidecar has ranked all jobs. Raises `BenchError` if it does not."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while self.scheduler._ranked_jobs < len(self.scheduler.requests) - 1:
            if time.monotonic() > deadline:
                raise BenchError("the sidecar did not rank all jobs in time")
            self.step()


def measure_overheads(
    slots: Sequence[int], waiting: Sequence[int], steps: int
) -> Iterator[Overhead]:
    """Measure each combination over `steps` steps of each scheduler, taken in turns."""
    for case_slots, case_waiting in itertools.product(slots, waiting):
        with tempfile.TemporaryDirectory(prefix="alise-bench-") as name:
            yield _measure(Path(name), case_slots, case_waiting, steps)


def _measure(folder: Path, slots: int, waiting: int, steps: int) -> Overhead:
    with _sidecar(folder, jobs=slots + waiting + 10_000) as address:
        os.environ["ALISE_SCHEDULER"] = address
        build = partial(build_scheduler, folder=folder, slots=slots, async_scheduling=True)
        stock = _Line(build(AsyncScheduler), slots, waiting)
        scheduler = build(AliseScheduler, policy="priority")  # as `alise serve` runs it
        try:
            ours = _Line(scheduler, slots, waiting)
            ours.settle()
            stock_s: list[float] = []
            ours_s: list[float] = []
            for _ in range(_ROUNDS):
                stock_s += [stock.step() for _ in range(steps // _ROUNDS)]
                ours_s += [ours.step() for _ in range(steps // _ROUNDS)]
        finally:
            scheduler.shutdown()
    times = [1e3 * f(s) for f in (median, fmean) for s in (stock_s, ours_s)]
    return Overhead(slots, waiting, *times)


@contextlib.contextmanager
def _sidecar(folder: Path, jobs: int) -> Iterator[str]:
    """Run a sidecar that knows the length of every job; yield its address."""
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, jobs).astype(int) + 1
    oracle = {key_of(prompt_of(number)): int(n) for number, n in enumerate(lengths)}
    (folder / "oracle.json").write_text(json.dumps(oracle), encoding="utf-8")
    address = f"unix://{folder}/scheduler.sock"
    command = [sys.executable, "-m", "alise_scheduler", "scheduler", "--listen", address]
    command += ["--state-dir", f"{folder}/state", "--oracle-file", f"{folder}/oracle.json"]
    command += ["--metrics-port", "0", "--log-level", "error"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.Popen(command, env=environment)
    try:
        yield address
    finally:
        process.terminate()
        process.wait()
