"""From samples to models: one for jobs at arrival, one for answers in progress.

Pure given samples and a random generator. Both models stack: a kernel ridge (and, at arrival,
retrieval) reads the wide features, and XGBoost quantiles read its out-of-group prediction beside
the few readable features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.answer_features import ANSWER_LEXICAL, ANSWER_WIDTH, STRUCTURE
from alise_scheduler.lengths import QUANTILE_LEVELS, remaining_after
from alise_scheduler.prompt_features import LEXICAL, NUMERIC, PROMPT_WIDTH, PromptFeatures
from alise_scheduler.quantile_model import QuantileModel, fit_quantiles
from alise_scheduler.retrieval import Retrieval, fit_retrieval
from alise_scheduler.ridge import Bag, Ridge, fit_ridge
from alise_scheduler.token_table import DIMENSIONS

Array = npt.NDArray[np.float32]

_MAX_TRAINING_JOBS: Final = 8000
_MAX_ANSWER_ROWS: Final = 8000
_PROMPT_LANDMARKS: Final = 512
_ANSWER_LANDMARKS: Final = 320
_MIN_ANSWER_ROWS: Final = 48
_MAX_IMPUTED_SHARE: Final = 0.5
_EPSILON: Final = 1e-6

_PROMPT_BLOCKS: Final = (
    (0, LEXICAL),
    *((LEXICAL + i * DIMENSIONS, LEXICAL + (i + 1) * DIMENSIONS) for i in range(2)),
)
_ANSWER_BLOCKS: Final = (
    (0, ANSWER_LEXICAL),
    (ANSWER_LEXICAL, ANSWER_WIDTH),
    # The prompt's lexical features and the arrival model's prediction.
    (ANSWER_WIDTH, ANSWER_WIDTH + LEXICAL + 2),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An answer's features when it had `output_tokens` tokens."""

    output_tokens: int
    dense: npt.NDArray[np.float16]  # [ANSWER_WIDTH]
    bag: Bag


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished job."""

    prompt: PromptFeatures
    snapshots: tuple[Snapshot, ...]
    output_tokens: int
    is_censored: bool
    """The true length is at least `output_tokens`."""


@dataclass(frozen=True, slots=True)
class ArrivalModel:
    """Quantiles of a job's whole length from its prompt."""

    ridge: Ridge
    retrieval: Retrieval
    quantiles: QuantileModel

    def predict(self, dense: Array, bags: Sequence[Bag]) -> tuple[Array, Array]:
        """Return log-quantiles [n, levels] and the ridge's rank [n]."""
        ranks = self.ridge.predict(dense, bags)
        rows = _arrival_columns(dense, ranks, self.retrieval.features(dense))
        return self.quantiles.predict(rows), ranks


@dataclass(frozen=True, slots=True)
class AnswerModel:
    """Quantiles of what remains of a job from its answer so far."""

    ridge: Ridge
    quantiles: QuantileModel

    def predict(self, rows: Array, bags: Sequence[Bag]) -> Array:
        """Return log-quantiles [n, levels] of the remaining length; rows as of `answer_rows`."""
        stacked = self.ridge.predict(rows, bags)
        return self.quantiles.predict(_answer_columns(rows, stacked))


@dataclass(frozen=True, slots=True)
class Models:
    """What one training gives; replaced as a whole."""

    arrival: ArrivalModel
    answer: AnswerModel | None
    """None before enough answers were seen in progress."""


def answer_rows(answers: Array, prompts: Array, ranks: Array, logs: Array) -> Array:
    """Return the rows of `AnswerModel`: answer, lexical prompt, the prompt's own prediction.

    `ranks` [n] and `logs` [n] are the arrival model's rank and the log-length that it means.
    """
    written = answers[:, :1]
    left = np.log1p(np.maximum(np.exp(logs[:, None]) - np.expm1(written), 0.0))
    rows = [answers, prompts[:, :LEXICAL], ranks[:, None], left]
    return np.hstack(rows).astype(np.float32)


# The trees see little beside the ridge's rank (first, and monotone): with hundreds of jobs, every
# further column costs more in noise than it tells.
def _arrival_columns(dense: Array, ranks: Array, neighbours: Array) -> Array:
    return np.hstack([ranks[:, None], neighbours, dense[:, :NUMERIC]])


def _answer_columns(rows: Array, ranks: Array) -> Array:
    return np.hstack([ranks[:, None], rows[:, :STRUCTURE], rows[:, -2:]])


def stack_prompts(samples: Sequence[Sample]) -> Array:
    """Return float32 [n, PROMPT_WIDTH]."""
    if not samples:
        return np.empty((0, PROMPT_WIDTH), dtype=np.float32)
    return np.stack([sample.prompt.dense for sample in samples]).astype(np.float32)


def true_lengths(
    samples: Sequence[Sample], current: Models | None, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return each sample's length, tokens; drawn for the censored ones, NaN where unknowable.

    A censored job's length is drawn from the current model's distribution above what it put out:
    an unbiased stand-in, where its output alone would count as a short answer. Without a model
    such jobs are left out, and of very many only the newest count.
    """
    lengths = np.array([float(sample.output_tokens) for sample in samples])
    censored = [i for i, sample in enumerate(samples) if sample.is_censored]
    allowed = int((len(samples) - len(censored)) * _MAX_IMPUTED_SHARE / (1 - _MAX_IMPUTED_SHARE))
    kept = censored[len(censored) - min(allowed, len(censored)) :] if current else []
    lengths[censored] = np.nan
    if current is None or not kept:
        return lengths
    chosen = [samples[i] for i in kept]
    logs, _ = current.arrival.predict(stack_prompts(chosen), [s.prompt.bag for s in chosen])
    for index, quantiles in zip(kept, np.exp(logs), strict=True):
        done = samples[index].output_tokens
        left = remaining_after(tuple(quantiles.tolist()), done)
        lengths[index] = done + max(left[int(rng.integers(len(left)))], 1.0)
    return lengths


def train(
    samples: Sequence[Sample], current: Models | None, rng: np.random.Generator
) -> Models | None:
    """Fit both models on the newest of `samples`; None when too few lengths are known."""
    samples = samples[-_MAX_TRAINING_JOBS:]
    lengths = true_lengths(samples, current, rng)
    known = np.flatnonzero(np.isfinite(lengths))
    if len(known) < 8:
        return None
    samples, lengths = [samples[i] for i in known], lengths[known]
    dense, bags = stack_prompts(samples), [sample.prompt.bag for sample in samples]
    target = np.log(np.maximum(lengths, 1.0)).astype(np.float32)
    groups = np.arange(len(samples))
    ridge, stacked = fit_ridge(dense, bags, target, groups, _PROMPT_BLOCKS, _PROMPT_LANDMARKS, rng)
    retrieval, neighbours = fit_retrieval(dense, target)
    rows = _arrival_columns(dense, stacked, neighbours)
    arrival = ArrivalModel(ridge, retrieval, fit_quantiles(rows, target, groups, rng))
    return Models(arrival, _train_answers(samples, lengths, dense, stacked, ridge, rng))


def _train_answers(
    samples: Sequence[Sample],
    lengths: npt.NDArray[np.float64],
    dense: Array,
    ranks: Array,
    arrival: Ridge,
    rng: np.random.Generator,
) -> AnswerModel | None:
    pairs = [
        (index, snapshot)
        for index, sample in enumerate(samples)
        for snapshot in sample.snapshots
        if snapshot.output_tokens < lengths[index]
    ][-_MAX_ANSWER_ROWS:]
    if len(pairs) < _MIN_ANSWER_ROWS:
        return None
    groups = np.array([index for index, _ in pairs])
    answers = np.stack([snapshot.dense for _, snapshot in pairs]).astype(np.float32)
    rows = answer_rows(answers, dense[groups], ranks[groups], arrival.to_target(ranks[groups]))
    bags = [snapshot.bag for _, snapshot in pairs]
    written = np.array([snapshot.output_tokens for _, snapshot in pairs])
    target = np.log(np.maximum(lengths[groups] - written, 1.0)).astype(np.float32)
    ridge, own = fit_ridge(rows, bags, target, groups, _ANSWER_BLOCKS, _ANSWER_LANDMARKS, rng)
    return AnswerModel(ridge, fit_quantiles(_answer_columns(rows, own), target, groups, rng))


def marginal_quantiles(lengths: npt.NDArray[np.float64]) -> Array:
    """Return log-quantiles [levels] of the lengths themselves: what any model must beat."""
    known = np.log(np.maximum(lengths[np.isfinite(lengths)], 1.0))
    quantiles: Array = np.quantile(known, QUANTILE_LEVELS).astype(np.float32)
    return quantiles
