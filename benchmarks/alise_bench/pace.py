"""A worker whose steps take the time that a hardware profile says, however busy the machine is.

Bench only. Above capacity latency multiplies what the machine's speed does, so that two runs on a
machine that other programs share cannot be compared. Here the model computes, and then the step is
held until its time is up: all systems meet the same speed. What else the engine does in a step
(scheduling, copies of the KV tier, sampling) takes its own time on top, in every system.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from alise_scheduler.cost_model import StepCost
from vllm.v1.worker.cpu_worker import CPUWorker

from alise_bench.simulation.profiles import load_profile
from alise_bench.store import write_json
from alise_bench.systems import PACE_COUNTS_VARIABLE, PACE_VARIABLE

_STEPS_PER_COUNT: Final = 20


class Hold:
    """Keeps a step from ending early: it counts the time in the functions that it wraps."""

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._clock: Final = clock
        self._sleep: Final = sleep
        self._left_s = 0.0
        self.steps = 0
        self.paced_s = 0.0
        """What they should take, in sum."""
        self.late_s = 0.0
        """By how much they took longer by themselves, in sum."""

    def begin(self, step_s: float) -> None:
        """Begin a step that takes `step_s` at least, in the wrapped functions alone."""
        self._left_s = step_s
        self.steps += 1
        self.paced_s += step_s

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose time counts towards the step's."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            began_s = self._clock()
            result = function(*args, **kwargs)
            self._left_s -= self._clock() - began_s
            return result

        return counting

    def ending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, the step's last: it returns when the step's time is up."""
        counting = self.counted(function)

        def held(*args: Any, **kwargs: Any) -> Any:
            result = counting(*args, **kwargs)
            if self._left_s > 0:
                self._sleep(self._left_s)
            elif self.steps:
                self.late_s -= self._left_s
            self._left_s = 0.0
            return result

        return held


def step_seconds(scheduled: Any, cost: StepCost) -> float:
    """Return how long the step of a vLLM `SchedulerOutput` takes by `cost`."""
    cached = scheduled.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    tokens: dict[str, int] = scheduled.num_scheduled_tokens
    decoding = [job for job, count in tokens.items() if count == 1]
    prefill = sum(count for count in tokens.values() if count > 1)
    return cost.step_s(prefill, len(decoding), sum(computed[job] for job in decoding))


class PacedWorker(CPUWorker):  # type: ignore[misc]  # vLLM is Any to mypy
    """vLLM's CPU worker, paced by the profile that ALISE_BENCH_PACE names.

    How well the machine holds the pace goes to the file that ALISE_BENCH_PACE_COUNTS names.
    """

    def load_model(self, **options: Any) -> None:
        """Load the model, and wrap what computes: its layers and its logits."""
        super().load_model(**options)
        self._step_cost = load_profile(os.environ[PACE_VARIABLE]).hardware.step
        self._hold = Hold(time.perf_counter, time.sleep)
        runner = self.model_runner
        runner._model_forward = self._hold.counted(runner._model_forward)
        runner.model.compute_logits = self._hold.ending(runner.model.compute_logits)
        self._write_counts()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run one step, as long as the profile says."""
        hold = self._hold
        hold.begin(step_seconds(scheduler_output, self._step_cost))
        result = super().execute_model(scheduler_output)
        if hold.steps % _STEPS_PER_COUNT == 0:
            self._write_counts()
        return result

    def _write_counts(self) -> None:
        counts = {"paced_s": self._hold.paced_s, "late_s": self._hold.late_s}
        write_json(Path(os.environ[PACE_COUNTS_VARIABLE]), counts)
