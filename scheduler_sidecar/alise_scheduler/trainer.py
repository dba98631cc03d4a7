"""When a candidate may replace the current models: only if it is better on recent jobs. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from alise_scheduler.quantile_model import pinball
from alise_scheduler.training import (
    Array,
    Models,
    Sample,
    marginal_quantiles,
    prompt_bags,
    stack_prompts,
    train,
)

_HOLDOUT_SHARE: Final = 0.2
_MIN_HOLDOUT: Final = 12
_DRIFT_RECENT: Final = 500


@dataclass(frozen=True, slots=True)
class Trained:
    """What is known of the models in use."""

    version: int
    trained_unix_s: float
    samples_seen: int
    """Jobs seen, over all time, when they were trained."""
    loss: float
    """Mean pinball loss at arrival on the holdout, before the final fit; NaN without models."""


UNTRAINED: Final = Trained(version=0, trained_unix_s=0.0, samples_seen=0, loss=math.nan)


def improve(
    samples: Sequence[Sample],
    seen: int,
    current: Models | None,
    trained: Trained,
    is_drifting: bool,
    now_unix_s: float,
    rng: np.random.Generator,
) -> tuple[Models, Trained] | None:
    """Return new models if a candidate beats the current ones (at first: the mere distribution).

    The holdout is recent jobs that neither has seen: those since the current models were
    trained, or the newest fifth at first. A winner is fitted again on everything. After drift
    only recent jobs count.
    """
    if is_drifting:
        samples = samples[-_DRIFT_RECENT:]
    fresh = seen - trained.samples_seen if current else int(len(samples) * _HOLDOUT_SHARE)
    held = min(fresh, int(len(samples) * 0.5))
    past, recent = samples[: len(samples) - held], samples[len(samples) - held :]
    recent = [sample for sample in recent if not sample.is_censored]
    candidate = train(past, current, rng) if len(recent) >= _MIN_HOLDOUT else None
    if candidate is None:
        return None
    loss = holdout_loss(candidate, recent)
    if loss >= _loss_to_beat(current, past, recent):
        return None
    final = train(samples, current, rng)
    if final is None:
        return None
    return final, Trained(trained.version + 1, now_unix_s, seen, loss)


def holdout_loss(models: Models, samples: Sequence[Sample]) -> float:
    """Return the mean pinball loss (of log-lengths) at arrival."""
    logs, _ = models.arrival.predict(stack_prompts(samples), prompt_bags(samples))
    return float(pinball(logs, _log_lengths(samples)).mean())


def _loss_to_beat(
    current: Models | None, past: Sequence[Sample], recent: Sequence[Sample]
) -> float:
    if current is not None:
        return holdout_loss(current, recent)
    known = np.array([float(s.output_tokens) for s in past if not s.is_censored])
    if not len(known):
        return math.inf
    target = _log_lengths(recent)
    marginal = np.tile(marginal_quantiles(known), (len(recent), 1))
    return float(pinball(marginal, target).mean())


def _log_lengths(samples: Sequence[Sample]) -> Array:
    return np.log([max(s.output_tokens, 1) for s in samples]).astype(np.float32)
