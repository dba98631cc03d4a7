"""Answer lengths as distributions: quantiles, and what living longer does to them.

Pure. A distribution is a tuple of five quantiles in tokens; this module does not know how
they were predicted, and nothing about seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Final, TypeAlias

Quantiles: TypeAlias = tuple[float, ...]
"""Tokens at `QUANTILE_LEVELS`, in ascending order, each at least 1."""

QUANTILE_LEVELS: Final = (0.1, 0.25, 0.5, 0.75, 0.9)

_MASS_POINTS: Final = 20
# Beyond the outer quantiles the log-length goes on as straight as between the two outermost.
_TAIL_LEVEL: Final = 0.995
# A job that outlived its whole predicted distribution: lengths have heavy tails, so what is left
# grows with what has passed (Lindy's law), here by this share.
OUTLIVED_SHARE: Final = 0.35
OUTLIVED_MIN_TOKENS: Final = 8.0


def _places() -> Iterator[tuple[int, float]]:
    """Where each mass point lies: the quantile to its left, and how far on to the next one."""
    for index in range(_MASS_POINTS):
        level = min((index + 0.5) / _MASS_POINTS, _TAIL_LEVEL)
        right = min(max(bisect_right(QUANTILE_LEVELS, level), 1), len(QUANTILE_LEVELS) - 1)
        low, high = QUANTILE_LEVELS[right - 1], QUANTILE_LEVELS[right]
        yield right - 1, (level - low) / (high - low)


_PLACES: Final = tuple(_places())


# A running job asks for the same distribution at each report of its progress.
@lru_cache(maxsize=4096)
def mass_points(quantiles: Quantiles) -> tuple[float, ...]:
    """Return `_MASS_POINTS` equally likely lengths (tokens, ascending) of the distribution.

    Log-linear between the quantiles, and beyond them up to the levels 0.005 and 0.995.
    """
    logs = [math.log(max(q, 1.0)) for q in quantiles]
    rises = [right - left for left, right in pairwise(logs)]
    return tuple([max(math.exp(logs[i] + share * rises[i]), 1.0) for i, share in _PLACES])


def remaining_after(quantiles: Quantiles, lived_tokens: float) -> tuple[float, ...]:
    """Return equally likely *remaining* lengths of a job that has put out `lived_tokens` more.

    `quantiles` describe the length still to come when they were predicted; `lived_tokens` have
    come out since. The mass at or below `lived_tokens` is ruled out. Never empty.
    """
    left = tuple([p - lived_tokens for p in mass_points(quantiles) if p > lived_tokens])
    if left:
        return left
    return (max(OUTLIVED_MIN_TOKENS, OUTLIVED_SHARE * lived_tokens),)


def mean(points: tuple[float, ...]) -> float:
    """Return the mean of equally likely lengths, tokens."""
    return sum(points) / len(points)
