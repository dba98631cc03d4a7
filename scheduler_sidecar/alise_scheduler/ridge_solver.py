"""Ridge regression with the penalty chosen on groups left out, in closed form. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

PENALTIES: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def solve_ridge(
    design: npt.NDArray[np.float64], target: Array, groups: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return ridge coefficients and out-of-group predictions, by one eigendecomposition."""
    count, width = design.shape
    if count <= width:
        squares, left = np.linalg.eigh(design @ design.T)
    else:
        squares, right = np.linalg.eigh(design.T @ design)
        left = design @ right / np.sqrt(np.maximum(squares, 1e-9))
    kept = squares > 1e-7 * max(float(squares[-1]), 1e-12)
    squares, left = squares[kept], left[:, kept]
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), count]
    best: tuple[float, float, npt.NDArray[np.float64]] | None = None
    for penalty in PENALTIES:
        held_out = _out_of_group(left, squares / (squares + penalty), target, edges)
        error = float(np.square(target - held_out).mean())
        if best is None or error < best[0]:
            best = (error, penalty, held_out)
    assert best is not None
    dual = left @ ((left.T @ target) / (squares + best[1]))
    return design.T @ dual, best[2]


def _out_of_group(
    left: npt.NDArray[np.float64],
    shrink: npt.NDArray[np.float64],
    target: Array,
    edges: list[int],
) -> npt.NDArray[np.float64]:
    # With the hat matrix H, the residuals of a left-out group g are (I - H_gg)^-1 (y - Hy)_g.
    # H includes the intercept that centring fits, 1/n everywhere: without it small penalties look
    # far better than they are.
    intercept = 1.0 / len(target)
    residual = target - left @ (shrink * (left.T @ target))
    held_out = np.empty(len(target))
    weighted = left * shrink
    for a, b in pairwise(edges):
        hat = weighted[a:b] @ left[a:b].T + intercept
        held_out[a:b] = np.linalg.solve(np.eye(b - a) * (1 + 1e-9) - hat, residual[a:b])
    return target - held_out
