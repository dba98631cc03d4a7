"""Kernel ridge regression over blocks of features and a hashed bag of words.

The kernel adds a Gaussian for each block of (standardized) columns, a heavier one over all, a
linear part for the first block and the cosine of the bags (by inverse document frequency). Few
landmarks (Nystroem) in few principal axes keep a prediction at a small matrix product. What is
regressed is the target's rank: a squared error of log-lengths would be ruled by a few very short
answers. Fitting also gives predictions out of group, to be features of a second model (stacking).
Pure; does not know what the columns mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from alise_scheduler.prompt_features import BAG_BUCKETS
from alise_scheduler.ridge_solver import solve_ridge

Array = npt.NDArray[np.float32]
Bag = npt.NDArray[np.uint16]
BagMatrix = npt.NDArray[np.bool_]

_AXES: Final = 64
_MAX_BUCKETS: Final = 600
_BAG_WEIGHT: Final = 0.5
_LINEAR_WEIGHT: Final = 0.5
_BLOCK_WIDTH: Final = 0.25
_JOINT_WIDTH: Final = 0.5
_JOINT_WEIGHT: Final = np.float32(3.0)
_RANKS: Final = np.linspace(0.0, 1.0, 41)
_JITTER: Final = 1e-3
_ROWS_AT_ONCE: Final = 128
"""A block of kernels that stays in the cache."""


@dataclass(frozen=True, slots=True)
class Ridge:
    """A fitted model: ranks of the target, about 0 to 1, from rows and bags."""

    blocks: tuple[tuple[int, int], ...]
    mean: Array
    scale: Array  # of each column: 1 / (deviation * sqrt(width of its block)); 0 for constants
    axes: Array  # [width, _AXES], principal ones of each wide block
    landmarks: Array  # [reduced width, m], scaled and reduced
    landmark_norms: Array  # [blocks, m]
    weights: Array  # [m]
    linear: Array  # [columns of the first block]
    buckets: npt.NDArray[np.int64]  # those that count
    bag_weights: Array  # [len(buckets), 2]: weight times idf, square of idf
    targets: Array  # [len(_RANKS)], the target at these ranks
    intercept: float

    def predict(self, rows: Array, bags: BagMatrix) -> Array:
        """Return ranks, float32 [n], of `rows` [n, width] and `bags` [n, BAG_BUCKETS]."""
        parts = range(0, len(rows), _ROWS_AT_ONCE)
        return np.concatenate(
            [self._ranks(rows[i : i + _ROWS_AT_ONCE], bags[i : i + _ROWS_AT_ONCE]) for i in parts]
        )

    def _ranks(self, rows: Array, bags: BagMatrix) -> Array:
        scaled = (rows - self.mean) * self.scale
        reduced = _reduce(scaled, self.axes, self.blocks)
        value = _kernel(reduced, self.landmarks, self.landmark_norms) @ self.weights
        value += scaled[:, slice(*self.blocks[0])] @ self.linear
        words = bags.take(self.buckets, axis=1).astype(np.float32) @ self.bag_weights
        value += words[:, 0] / np.sqrt(np.maximum(words[:, 1], 1e-12))
        value += np.float32(self.intercept)
        return value

    def to_target(self, ranks: Array) -> Array:
        """Return the target at `ranks`; those beyond 0 and 1 give the extremes."""
        return target_at(ranks, self.targets)


def targets_of(target: Array) -> Array:
    """Return the targets at `_RANKS`, for `target_at`."""
    return np.quantile(target, _RANKS).astype(np.float32)


def target_at(ranks: Array, targets: Array) -> Array:
    """Return the target at `ranks`, by those at `_RANKS`; ranks beyond give the extremes."""
    result: Array = np.interp(ranks, _RANKS, targets).astype(np.float32)
    return result


def bag_matrix(bags: Sequence[Bag]) -> BagMatrix:
    """Return bool [len(bags), BAG_BUCKETS]: which buckets are in which bag."""
    matrix = np.zeros((len(bags), BAG_BUCKETS), dtype=np.bool_)
    for row, bag in zip(matrix, bags, strict=True):
        row[bag] = True
    return matrix


def _reduce(scaled: Array, axes: Array, blocks: tuple[tuple[int, int], ...]) -> list[Array]:
    """Return the blocks' columns, [n, at most _AXES] each."""
    return [
        scaled[:, a:b] if b - a <= _AXES else np.ascontiguousarray(scaled[:, a:b]) @ axes[a:b]
        for a, b in blocks
    ]


def _principal_axes(scaled: Array, blocks: tuple[tuple[int, int], ...]) -> Array:
    """Return the axes of wide blocks, longer for the distances that the others' loss takes away."""
    axes = np.zeros((scaled.shape[1], _AXES), dtype=np.float32)
    for a, b in blocks:
        if b - a > _AXES:
            moment = scaled[:, a:b].T.astype(np.float64) @ scaled[:, a:b]
            variances, vectors = np.linalg.eigh(moment)
            kept = variances[-_AXES:].sum() / max(float(variances.sum()), 1e-12)
            axes[a:b] = vectors[:, -_AXES:] / np.sqrt(max(kept, 1e-6))
    return axes


def _norms(parts: Sequence[Array]) -> Array:
    return np.array([np.square(part).sum(1) for part in parts])


def _kernel(parts: Sequence[Array], landmarks: Array, landmark_norms: Array) -> Array:
    """Return the Gaussian kernels of the blocks and of all blocks together, added, [n, m]."""
    shape = (len(parts) + 1, len(parts[0]), landmarks.shape[1])
    exponents = np.empty(shape, dtype=np.float32)
    own = -_BLOCK_WIDTH * _norms(parts)
    others = -_BLOCK_WIDTH * landmark_norms
    start = 0
    for number, part in enumerate(parts):
        end = start + part.shape[1]
        exponent = exponents[number]
        np.matmul(part * np.float32(2 * _BLOCK_WIDTH), landmarks[start:end], out=exponent)
        exponent += others[number]
        exponent += own[number][:, None]
        start = end
    # Far from everything seen a block says nothing; the clip also keeps exp() normal.
    each, joint = exponents[:-1], exponents[-1]
    np.clip(each, -100.0 * _BLOCK_WIDTH, 0.0, out=each)
    each.sum(0, out=joint)
    joint *= _JOINT_WIDTH / _BLOCK_WIDTH
    np.maximum(joint, -50.0, out=joint)
    np.exp(exponents, out=exponents)
    joint *= _JOINT_WEIGHT
    total: Array = exponents.sum(0)
    return total


def fit_ridge(
    rows: Array,
    bags: BagMatrix,
    target: Array,
    groups: npt.NDArray[np.int64],
    strata: npt.NDArray[np.int64],
    blocks: tuple[tuple[int, int], ...],
    max_landmarks: int,
    rng: np.random.Generator,
) -> tuple[Ridge, Array]:
    """Fit on `rows` [n, width]; return the model and ranks predicted without each row's group.

    `groups` [n] ascend: rows of one job are next to each other. A rank is among the rows of the
    same number in `strata` [n]. The penalty is the one with the least squared error out of group.
    """
    mean, scale = _standardization(rows, blocks)
    scaled = (rows - mean) * scale
    chosen = np.sort(rng.permutation(len(rows))[:max_landmarks])
    axes = _principal_axes(scaled, blocks)
    reduced = _reduce(scaled, axes, blocks)
    landmarks = np.ascontiguousarray(np.hstack(reduced)[chosen].T)
    norms = _norms([part[chosen] for part in reduced])
    cross = np.vstack(
        [
            _kernel([part[i : i + _ROWS_AT_ONCE] for part in reduced], landmarks, norms)
            for i in range(0, len(rows), _ROWS_AT_ONCE)
        ]
    ).astype(np.float64)
    lower = np.linalg.cholesky(cross[chosen] + _JITTER * np.eye(len(chosen)))
    half = solve_triangular(lower, np.eye(len(chosen)), lower=True).T
    buckets, idf = _inverse_frequency(bags)
    first = scaled[:, slice(*blocks[0])] * np.sqrt(_LINEAR_WEIGHT)
    design = np.hstack([cross @ half, first, _words(bags, buckets, idf)])
    center = design.mean(0)
    ranks = ranks_of(target, strata)
    intercept = float(ranks.mean())
    coefficients, held_out = solve_ridge(design - center, ranks - intercept, groups)
    kernel_end, linear_end = len(chosen), len(chosen) + first.shape[1]
    bag_weights = coefficients[linear_end:] * idf * np.sqrt(_BAG_WEIGHT)
    model = Ridge(
        blocks=blocks,
        mean=mean,
        scale=scale,
        axes=axes,
        landmarks=landmarks,
        landmark_norms=norms,
        weights=(half @ coefficients[:kernel_end]).astype(np.float32),
        linear=(coefficients[kernel_end:linear_end] * np.sqrt(_LINEAR_WEIGHT)).astype(np.float32),
        buckets=buckets,
        bag_weights=np.stack((bag_weights, np.square(idf)), axis=1).astype(np.float32),
        targets=targets_of(target),
        intercept=intercept - float(center @ coefficients),
    )
    return model, (held_out + intercept).astype(np.float32)


def ranks_of(target: Array, strata: npt.NDArray[np.int64]) -> Array:
    """Return the rank of each target in its stratum, 0 to 1; equal targets share theirs."""
    ranks = np.empty(len(target), dtype=np.float32)
    for stratum in np.unique(strata):
        own = strata == stratum
        ordered = np.sort(target[own])
        low = np.searchsorted(ordered, target[own])
        ranks[own] = (low + np.searchsorted(ordered, target[own], side="right")) / (2 * own.sum())
    return ranks


def _standardization(rows: Array, blocks: tuple[tuple[int, int], ...]) -> tuple[Array, Array]:
    deviation = rows.std(0)
    scale = np.zeros_like(deviation)
    for a, b in blocks:
        varies = deviation[a:b] > 1e-4
        scale[a:b][varies] = 1.0 / (deviation[a:b][varies] * np.sqrt(varies.sum()))
    return rows.mean(0), scale


def _inverse_frequency(bags: BagMatrix) -> tuple[npt.NDArray[np.int64], Array]:
    """Return the buckets found in most bags, ascending, and their inverse document frequency."""
    counts = bags.sum(0)
    frequent = np.argsort(-counts, kind="stable")[:_MAX_BUCKETS]
    frequent = np.sort(frequent[counts[frequent] >= 2])
    idf = np.log((len(bags) + 1) / (counts[frequent] + 1)).astype(np.float32)
    return frequent[idf > 0], idf[idf > 0]


def _words(bags: BagMatrix, buckets: npt.NDArray[np.int64], idf: Array) -> npt.NDArray[np.float64]:
    """Return the bags' cosine features, [n, len(buckets)]."""
    matrix = bags[:, buckets] * idf
    norms = np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-6)
    result: npt.NDArray[np.float64] = (matrix / norms * np.sqrt(_BAG_WEIGHT)).astype(np.float64)
    return result
