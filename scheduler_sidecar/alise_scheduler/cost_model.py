"""The cost model: from tokens to seconds on the machine that serves, fitted to its own steps.

Pure. An engine step that prefills `p` tokens and decodes one token for each of `j` jobs with `c`
context tokens in all takes `base + p * prefill + j * decode + c * context` seconds. From that and
the present load follows a job's own time, T(s, n) = T_prefill(s) + T_decode(s, n), the form of
Zhao and Wang, "ALISE" (ICCAD 2024, arXiv 2410.23537), with T_prefill ~ s * t0 and
T_decode ~ n * (a * s + b); the context term a * s enters by the mean context of the batch, as a
decoding job waits for the whole step. Where drafts are verified, a step's duration is shared by the
tokens that it gives a job on average.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from alise_scheduler.events import StepTiming

_WINDOW_STEPS: Final = 512
_LOAD_STEPS: Final = 64
_REFIT_STEPS: Final = 32  # the first fit needs as many, each next one this many more
_OUTLIER_RATIO: Final = 3.0
_LEAST_RATE_S: Final = 1e-7  # a rate of 0 would say that tokens are free

_Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepCost:
    """Coefficients of a step's duration. The defaults stand in until steps were measured."""

    base_s: float = 0.02
    prefill_s_per_token: float = 2e-4
    decode_s_per_job: float = 5e-4
    context_s_per_token: float = 0.0

    def step_s(self, prefill_tokens: float, decode_jobs: float, context_tokens: float) -> float:
        """Return the duration of a step, seconds."""
        return (
            self.base_s
            + self.prefill_s_per_token * prefill_tokens
            + self.decode_s_per_job * decode_jobs
            + self.context_s_per_token * context_tokens
        )


@dataclass(frozen=True, slots=True)
class ServiceRates:
    """T(s, n) at one load: what one token of prompt and one of answer cost a job, seconds."""

    prefill_s_per_token: float
    decode_s_per_token: float
    decode_jobs: float = 1.0
    """That share a step, on average."""
    wait_s_per_token: float = 0.0
    """What prompts of others, computed in the same steps, add to a token of answer on average."""

    def service_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Return T(s, n), seconds, for a prompt of s and an answer of n tokens."""
        return prompt_tokens * self.prefill_s_per_token + output_tokens * self.decode_s_per_token

    def elapsed_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Return how long a job has its slot, seconds: its own time, and what others add to it."""
        return self.service_s(prompt_tokens, output_tokens) + output_tokens * self.wait_s_per_token

    def engine_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Return what a job takes of the engine, seconds: over all jobs, the time that it is busy.

        All wait for a prompt, while those that decode share each step. So it tells how fast jobs go
        by, whatever keeps more of them from running at once: slots, tokens of a step, or memory.
        """
        shared_s = output_tokens * self.decode_s_per_token / self.decode_jobs
        return prompt_tokens * self.prefill_s_per_token + shared_s

    def differs_from(self, other: ServiceRates, share: float) -> bool:
        """Return whether either rate is more than `share` away from that of `other`."""
        return moved(self.prefill_s_per_token, other.prefill_s_per_token, share) or moved(
            self.decode_s_per_token, other.decode_s_per_token, share
        )


def moved(new: float, old: float, share: float) -> bool:
    """Return whether `new` is more than `share` of `old` away from it."""
    return abs(new - old) > share * abs(old)


def fit(steps: Sequence[StepTiming], prior: StepCost) -> StepCost:
    """Return the coefficients that explain `steps` best, none of them negative.

    Errors count relative to a step's duration, so that long prefills do not drown the decodes;
    steps more than `_OUTLIER_RATIO` off a first fit are dropped and the rest fitted again. What
    the steps say nothing about (no prefill among them, say) keeps its value of `prior`.
    """
    rows = np.array(
        [(1.0, s.prefill_tokens, s.decode_jobs, s.context_tokens) for s in steps], dtype=np.float64
    )
    durations_s = np.array([s.duration_s for s in steps], dtype=np.float64)
    kept = np.array(
        [prior.base_s, prior.prefill_s_per_token, prior.decode_s_per_job, prior.context_s_per_token]
    )
    kept = np.where(rows.any(axis=0), 0.0, kept)
    first = _relative_nnls(rows, durations_s)
    ratio = durations_s / np.maximum(rows @ first, 1e-9)
    ratio /= np.median(ratio)
    usual = (ratio < _OUTLIER_RATIO) & (ratio > 1 / _OUTLIER_RATIO)
    second = _relative_nnls(rows[usual], durations_s[usual])
    # Relative errors favour the short ones of steps that are alike: what all of them took in sum,
    # which decides how fast a queue drains, is kept.
    second *= durations_s[usual].sum() / (rows[usual] @ second).sum()
    return StepCost(*(second + kept).tolist())


def _relative_nnls(rows: _Array, durations_s: _Array) -> _Array:
    """Minimize |rows @ x / durations - 1| over x >= 0, with columns scaled to be alike."""
    relative = rows / durations_s[:, None]
    scale = np.maximum(np.linalg.norm(relative, axis=0), 1e-12)
    solution: _Array = nnls(relative / scale, np.ones(len(rows)))[0] / scale
    return solution


@dataclass(slots=True)
class CostModel:
    """A sliding window of measured steps, its fit, and the load that it sees now."""

    cost: StepCost = StepCost()
    is_fitted: bool = False
    window_steps: int = _WINDOW_STEPS
    """Fewer follow the machine sooner; more tell apart what a steady load mixes."""
    refit_steps: int = _REFIT_STEPS
    _steps: deque[StepTiming] = field(init=False)
    _load: deque[StepTiming] = field(default_factory=lambda: deque(maxlen=_LOAD_STEPS))
    _unfitted: int = 0
    _rates: ServiceRates | None = None
    """Of the load and fit as they are; asked for far more often than either changes."""

    def __post_init__(self) -> None:
        self._steps = deque(maxlen=self.window_steps)

    def observe(self, step: StepTiming) -> None:
        """Add a measured step; steps that ran nothing or took no time are ignored."""
        if step.duration_s <= 0 or not (step.prefill_tokens or step.decode_jobs):
            return
        self._steps.append(step)
        self._rates = None
        if step.decode_jobs:
            self._load.append(step)
        self._unfitted += 1
        if self._unfitted >= self.refit_steps:
            self.cost, self.is_fitted, self._unfitted = fit(self._steps, self.cost), True, 0

    def rates(self) -> ServiceRates:
        """Return what a token costs at the load of the last steps (one job before any).

        With speculative decoding a step gives a job several tokens, which share its duration.
        """
        if self._rates is None:
            self._rates = self._rates_at_load()
        return self._rates

    def _rates_at_load(self) -> ServiceRates:
        count = len(self._load)
        jobs = sum(s.decode_jobs for s in self._load) / count if count else 1.0
        context = sum(s.context_tokens for s in self._load) / count if count else 0.0
        prefill = sum(s.prefill_tokens for s in self._load) / count if count else 0.0
        tokens = (
            sum(max(s.decoded_tokens, s.decode_jobs) for s in self._load) / count if count else 1.0
        )
        return ServiceRates(
            max(self.cost.prefill_s_per_token, _LEAST_RATE_S),
            max(self.cost.step_s(0, jobs, context) * jobs / tokens, _LEAST_RATE_S),
            jobs,
            prefill * self.cost.prefill_s_per_token * jobs / tokens,
        )
