"""What is left of many jobs at once, given that they have lived: `lengths.remaining_after` on rows.

Pure. Works on log-quantiles, as models give them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.lengths import (
    OUTLIVED_MIN_TOKENS,
    OUTLIVED_SHARE,
    QUANTILE_LEVELS,
    mass_points,
)

Array = npt.NDArray[np.float32]

LARGEST_LOG: Final = 16.0
"""Of a length in tokens: above any context window, and exp() of it is finite."""

_LEVELS: Final = np.array(QUANTILE_LEVELS, dtype=np.float32)


def _basis() -> Array:
    """Return [levels, points]: log mass points are linear in the log-quantiles."""
    offset = 1.0  # keeps the probes above the least length
    columns = [
        np.log(mass_points(tuple(np.exp(offset + 0.1 * unit)))) - offset
        for unit in np.eye(len(QUANTILE_LEVELS))
    ]
    return (np.array(columns) / 0.1).astype(np.float32)


_BASIS: Final = _basis()
_POINTS: Final = _BASIS.shape[1]


def conditioned(log_quantiles: Array, lived_tokens: npt.NDArray[np.int64]) -> Array:
    """Return log-quantiles [n, levels] of the remaining length after `lived_tokens` [n]."""
    logs = np.clip(np.minimum(log_quantiles, LARGEST_LOG) @ _BASIS, 0.0, None)
    left = np.exp(logs) - lived_tokens[:, None].astype(np.float32)
    alive = (left > 0.0).sum(1)
    # The points ascend, so those still possible are the last ones.
    place = (_POINTS - alive)[:, None] + _LEVELS * np.maximum(alive - 1, 0)[:, None]
    low = np.minimum(place.astype(np.int64), _POINTS - 1)
    high = np.minimum(low + 1, _POINTS - 1)
    below = np.take_along_axis(left, low, axis=1)
    quantiles = below + (np.take_along_axis(left, high, axis=1) - below) * (place - low)
    outlived = alive == 0
    guess = np.maximum(OUTLIVED_SHARE * lived_tokens[outlived], OUTLIVED_MIN_TOKENS)
    quantiles[outlived] = guess[:, None]
    result: Array = np.log(np.maximum(quantiles, 1.0)).astype(np.float32)
    return result
