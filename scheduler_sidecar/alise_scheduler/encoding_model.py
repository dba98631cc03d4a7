"""From a prompt's encoding to its answer's length: a linear ridge, and XGBoost quantiles over it.

An encoding is a language model's own reading of the prompt, so a linear map says most of what it
knows. What the look-ups' model says of the prompt goes in beside it: it is all there is where the
encoder knows nothing of a language or a domain. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alise_scheduler.quantile_model import QuantileModel, fit_quantiles
from alise_scheduler.ridge import ranks_of, targets_of
from alise_scheduler.ridge_solver import solve_ridge

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EncodingModel:
    """Quantiles of a job's whole length, for prompts that were encoded."""

    mean: Array  # [ENCODING_WIDTH + 1]: the encoding, and the rank by look-ups
    scale: Array
    weights: Array
    intercept: float
    targets: Array
    """The target at the ranks of `ridge.target_at`."""
    quantiles: QuantileModel

    def predict(self, encodings: Array, ranks: Array, numbers: Array) -> tuple[Array, Array]:
        """Return log-quantiles [n, levels] and ranks [n].

        `encodings` [n, ENCODING_WIDTH]; of the same prompts `ranks` [n] by look-ups, and the
        `numbers` [n, NUMERIC] of their features.
        """
        columns = np.column_stack((encodings, ranks))
        own = (columns - self.mean) * self.scale @ self.weights + np.float32(self.intercept)
        return self.quantiles.predict(_rows(own, ranks, numbers)), own


def _rows(own: Array, ranks: Array, numbers: Array) -> Array:
    return np.column_stack((own, ranks, numbers))


def fit_encoding_model(
    encodings: Array,
    ranks: Array,
    numbers: Array,
    target: Array,
    depth: int,
    rng: np.random.Generator,
) -> tuple[EncodingModel, Array, Array]:
    """Fit on jobs whose `target` [n], log-lengths, are known; columns as for `predict`.

    `ranks` must be without each job itself. Returns also what the model says of the jobs without
    having seen them: ranks [n] and log-quantiles [n, levels].
    """
    columns = np.column_stack((encodings, ranks))
    mean, deviation = columns.mean(0), columns.std(0)
    # The encoding as a whole counts as much as the look-ups' rank.
    share = np.sqrt(np.array([1 / encodings.shape[1]] * encodings.shape[1] + [1.0]))
    scale = np.where(deviation > 1e-6, share / np.maximum(deviation, 1e-6), 0.0)
    groups = np.arange(len(target))
    wanted = ranks_of(target, np.zeros_like(groups))
    intercept = float(wanted.mean())
    design = ((columns - mean) * scale).astype(np.float64)
    weights, held_out = solve_ridge(design, wanted - np.float32(intercept), groups)
    own = (held_out + intercept).astype(np.float32)
    quantiles, logs = fit_quantiles(_rows(own, ranks, numbers), target, groups, depth, rng)
    model = EncodingModel(
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        weights=weights.astype(np.float32),
        intercept=intercept,
        targets=targets_of(target),
        quantiles=quantiles,
    )
    return model, own, logs
