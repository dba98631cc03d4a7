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
    train,
)

# Of the first jobs, of which half are held out.
_FIRST_SHARE: Final = 0.4
_MIN_HOLDOUT: Final = 12
_NEWEST_JOBS: Final = 100


@dataclass(frozen=True, slots=True)
class Trained:
    """What is known of the models in use."""

    version: int
    trained_unix_s: float
    samples_seen: int
    """Jobs seen, over all time, when they were trained."""
    loss: float
    """Mean pinball loss at arrival on the holdout, before the final fit; NaN without models."""
    learned_from: int
    """Jobs seen, over all time, before the first that they learned from: drift moves it on."""


UNTRAINED: Final = Trained(0, 0.0, samples_seen=0, loss=math.nan, learned_from=0)


def improve(
    samples: Sequence[Sample],
    seen: int,
    current: Models | None,
    trained: Trained,
    now_unix_s: float,
    rng: np.random.Generator,
) -> tuple[Models, Trained] | None:
    """Return new models if a candidate beats the current ones (at first: the mere distribution).

    Jobs that the current models have not seen are dealt out, every other one to learn from and to
    hold out. A second candidate learns from the newest jobs alone: where it is clearly better,
    lengths have drifted, and all older jobs are left behind. The winner is fitted again on all of
    its jobs, the ones held out included.
    """
    count = len(samples)
    fresh = min(seen - trained.samples_seen if current else int(count * _FIRST_SHARE), count)
    known = samples[: count - fresh]
    unseen, held = samples[count - fresh :: 2], samples[count - fresh + 1 :: 2]
    held = [sample for sample in held if not sample.is_censored]
    if len(held) < _MIN_HOLDOUT:
        return None
    start = max(trained.learned_from - (seen - count), 0)
    newest = count - max(fresh, _NEWEST_JOBS)
    best: tuple[Array, int] | None = None
    for first in [start, newest] if newest - start >= _NEWEST_JOBS else [start]:
        candidate = train([*known[first:], *unseen], current, rng, only_arrival=True)
        if candidate is not None:
            losses = holdout_losses(candidate, held)
            if best is None or _is_clearly_less(losses, best[0]):
                best = (losses, first)
    if best is None or best[0].mean() >= _loss_to_beat(current, [*known, *unseen], held):
        return None
    losses, first = best
    final = train(samples[first:], current, rng)
    if final is None:
        return None
    learned_from = seen - count + first if first else 0
    loss = float(losses.mean())
    return final, Trained(trained.version + 1, now_unix_s, seen, loss, learned_from)


def holdout_losses(models: Models, samples: Sequence[Sample]) -> Array:
    """Return the pinball losses [n] of log-lengths at arrival."""
    views = models.of_prompts([sample.prompt for sample in samples])
    return pinball(views.log_quantiles, _log_lengths(samples))


def _is_clearly_less(losses: Array, others: Array) -> bool:
    """Compare two models on the same jobs: by two standard errors of the mean difference."""
    gains = others - losses
    return float(gains.mean()) > 2 * float(gains.std()) / math.sqrt(len(gains))


def _loss_to_beat(
    current: Models | None, past: Sequence[Sample], recent: Sequence[Sample]
) -> float:
    if current is not None:
        return float(holdout_losses(current, recent).mean())
    known = np.array([float(s.output_tokens) for s in past if not s.is_censored])
    if not len(known):
        return math.inf
    target = _log_lengths(recent)
    marginal = np.tile(marginal_quantiles(known), (len(recent), 1))
    return float(pinball(marginal, target).mean())


def _log_lengths(samples: Sequence[Sample]) -> Array:
    return np.log([max(s.output_tokens, 1) for s in samples]).astype(np.float32)
