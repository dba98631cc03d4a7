"""From samples to models: for jobs at arrival, for encoded prompts, for answers by their age.

Pure given samples and a random generator. All models stack: a kernel ridge (and, at arrival,
retrieval) reads the wide features, and XGBoost quantiles read its out-of-group prediction beside
the few readable features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.answer_features import ANSWER_LEXICAL, ANSWER_WIDTH, LINES
from alise_scheduler.answer_lines import projected
from alise_scheduler.conditioning import conditioned
from alise_scheduler.encoding_ridge import EncodingRidge, fit_encoding_ridge
from alise_scheduler.lengths import QUANTILE_LEVELS, remaining_after
from alise_scheduler.prompt_features import ASKED, LEXICAL, NUMERIC, PromptFeatures
from alise_scheduler.quantile_model import QuantileModel, fit_quantiles, pinball
from alise_scheduler.retrieval import Retrieval, fit_retrieval
from alise_scheduler.ridge import (
    Bag,
    BagMatrix,
    Ridge,
    bag_matrix,
    fit_ridge,
    target_at,
    targets_of,
)
from alise_scheduler.token_table import DIMENSIONS
from alise_scheduler.trees import DEPTH

Array = npt.NDArray[np.float32]

MAX_TRAINING_JOBS: Final = 8_000
_MAX_ANSWER_ROWS: Final = 8000
_PROMPT_LANDMARKS: Final = 384
_ANSWER_LANDMARKS: Final = 256
_MIN_ANSWER_ROWS: Final = 48
_MIN_ENCODINGS: Final = 48
_MAX_IMPUTED_SHARE: Final = 0.5
_SHARES: Final = tuple(i / 10 for i in range(11))
_ANSWER_AGES: Final = (8, 64)
"""A model learns from all answers of this many tokens or more: what tells a long answer's rest
differs from what tells a young one's, and there are fewer of them to learn it from."""
_ARRIVAL_DEPTH: Final = 1
"""One row for each job does not teach interactions: deeper trees lose the ridge's order."""

_PROMPT_BLOCKS: Final = (
    (0, LEXICAL),
    *((LEXICAL + i * DIMENSIONS, LEXICAL + (i + 1) * DIMENSIONS) for i in range(3)),
)
# In front what the trees see, too: the arrival model's prediction, the list's projected rest.
_OUTLOOK: Final = 6
_ANSWER_BLOCKS: Final = (
    (0, 2),
    (2, _OUTLOOK + ANSWER_LEXICAL),
    (_OUTLOOK + ANSWER_LEXICAL, _OUTLOOK + ANSWER_WIDTH),
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

    def predict(self, dense: Array, bags: BagMatrix) -> tuple[Array, Array]:
        """Return log-quantiles [n, levels] and the ridge's rank [n]."""
        ranks = self.ridge.predict(dense, bags)
        rows = _arrival_columns(dense, ranks, self.retrieval.features(dense))
        return self.quantiles.predict(rows), ranks


@dataclass(frozen=True, slots=True)
class EncodingModel:
    """Quantiles of a job's whole length from its prompt's encoding."""

    ridge: EncodingRidge
    targets: Array
    """For `ridge.target_at`."""
    quantiles: QuantileModel

    def predict(self, dense: Array, ranks: Array, encodings: Array) -> tuple[Array, Array]:
        """Return log-quantiles [n, levels] and ranks [n]; `ranks` are the arrival model's."""
        own = self.ridge.predict(encodings, ranks)
        return self.quantiles.predict(_encoding_columns(dense, own, ranks)), own


@dataclass(frozen=True, slots=True)
class AnswerModel:
    """Quantiles of what remains of a job from its answer so far."""

    from_tokens: int
    """It has never seen younger answers."""
    ridge: Ridge
    encoding_ridge: EncodingRidge | None
    """Goes on from the ridge's rank where the prompt was encoded."""
    quantiles: QuantileModel
    share: float
    """Its part in the blend with the arrival model: what was best on jobs held out."""

    def predict(
        self,
        rows: Array,
        bags: BagMatrix,
        encodings: Sequence[Array | None],
        by_prompt: Array,
    ) -> Array:
        """Return log-quantiles [n, levels] of the remaining length; rows as of `answer_rows`.

        `encodings` [n] are the prompts', `by_prompt` [n, levels] is what they say, conditioned.
        """
        stacked = self.ridge.predict(rows, bags)
        which, columns = _known(encodings)
        if self.encoding_ridge is not None and len(which):
            stacked[which] = self.encoding_ridge.predict(columns, stacked[which])
        own = self.quantiles.predict(_answer_columns(rows, stacked))
        blended: Array = by_prompt + np.float32(self.share) * (own - by_prompt)
        return blended


@dataclass(frozen=True, slots=True)
class PromptViews:
    """What models say of prompts, a row each."""

    log_quantiles: Array  # [n, levels], of the whole length
    ranks: Array  # [n]
    logs: Array  # [n], the log-length that the rank means

    def replace(
        self, which: npt.NDArray[np.int64], log_quantiles: Array, ranks: Array, targets: Array
    ) -> None:
        """Put a better model's view in place of the one of the prompts `which`."""
        self.log_quantiles[which] = log_quantiles
        self.ranks[which] = ranks
        self.logs[which] = target_at(ranks, targets)


@dataclass(frozen=True, slots=True)
class Models:
    """What one training gives; replaced as a whole."""

    arrival: ArrivalModel
    encoding: EncodingModel | None
    """None: too few encodings, or it is no better on jobs that it has not seen."""
    answers: tuple[AnswerModel, ...]
    """By `from_tokens`, ascending: each is for answers younger than the next one's. Those that
    have seen enough answers in progress."""

    def of_prompts(self, prompts: Sequence[PromptFeatures]) -> PromptViews:
        """Return what is to be said of `prompts`, by their encodings where they have come."""
        dense, bags = _stacked(prompts)
        log_quantiles, ranks = self.arrival.predict(dense, bags)
        views = PromptViews(log_quantiles, ranks, self.arrival.ridge.to_target(ranks))
        if self.encoding is None:
            return views
        which, encodings = _known([prompt.encoding for prompt in prompts])
        if len(which):
            own = self.encoding.predict(dense[which], ranks[which], encodings)
            views.replace(which, *own, self.encoding.targets)
        return views


def _known(encodings: Sequence[Array | None]) -> tuple[npt.NDArray[np.int64], Array]:
    """Return the places [n] of the encodings that there are, and those [n, ENCODING_WIDTH]."""
    known = [(place, encoding) for place, encoding in enumerate(encodings) if encoding is not None]
    which = np.array([place for place, _ in known], dtype=np.int64)
    return which, np.array([encoding for _, encoding in known], dtype=np.float32)


def answer_rows(answers: Array, asked: Array, ranks: Array, logs: Array) -> Array:
    """Return the rows of `AnswerModel`: the prompt's own prediction, the list's rest, the answer.

    `asked` [n] is the prompts' column `ASKED`; `ranks` [n] and `logs` [n] are the arrival model's
    rank and the log-length that it means.
    """
    written = answers[:, :1]
    left = np.log1p(np.maximum(np.exp(logs[:, None]) - np.expm1(written), 0.0))
    rest = projected(answers[:, LINES], asked)
    return np.hstack([ranks[:, None], left, asked[:, None], rest, answers]).astype(np.float32)


# The trees see little beside the ridge's rank: with hundreds of jobs, every further column costs
# more in noise than it tells.
def _arrival_columns(dense: Array, ranks: Array, neighbours: Array) -> Array:
    return np.hstack([ranks[:, None], neighbours, dense[:, :NUMERIC]])


def _encoding_columns(dense: Array, ranks: Array, by_look_ups: Array) -> Array:
    return np.hstack([ranks[:, None], by_look_ups[:, None], dense[:, :NUMERIC]])


def _answer_columns(rows: Array, ranks: Array) -> Array:
    written = rows[:, _OUTLOOK, None]
    return np.hstack([ranks[:, None], written, rows[:, : _OUTLOOK + ANSWER_LEXICAL]])


def _stacked(prompts: Sequence[PromptFeatures]) -> tuple[Array, BagMatrix]:
    """Return float32 [n, PROMPT_WIDTH], and bool [n, BAG_BUCKETS]."""
    dense = np.array([prompt.dense for prompt in prompts], dtype=np.float32)
    return dense, bag_matrix([prompt.bag for prompt in prompts])


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
    views = current.of_prompts([sample.prompt for sample in chosen])
    for index, quantiles in zip(kept, np.exp(views.log_quantiles), strict=True):
        done = samples[index].output_tokens
        left = remaining_after(tuple(quantiles.tolist()), done)
        lengths[index] = done + max(left[int(rng.integers(len(left)))], 1.0)
    return lengths


def train(
    samples: Sequence[Sample],
    current: Models | None,
    rng: np.random.Generator,
    only_arrival: bool = False,
) -> Models | None:
    """Fit all models on the newest of `samples`; None when too few lengths are known."""
    samples = samples[-MAX_TRAINING_JOBS:]
    lengths = true_lengths(samples, current, rng)
    known = np.flatnonzero(np.isfinite(lengths))
    if len(known) < 8:
        return None
    samples, lengths = [samples[i] for i in known], lengths[known]
    dense, bags = _stacked([sample.prompt for sample in samples])
    target = np.log(np.maximum(lengths, 1.0)).astype(np.float32)
    groups = np.arange(len(samples))
    ridge, stacked = fit_ridge(
        dense, bags, target, groups, np.zeros_like(groups), _PROMPT_BLOCKS, _PROMPT_LANDMARKS, rng
    )
    retrieval, neighbours = fit_retrieval(dense, target)
    rows = _arrival_columns(dense, stacked, neighbours)
    quantiles, held_out = fit_quantiles(rows, target, groups, _ARRIVAL_DEPTH, rng)
    arrival = ArrivalModel(ridge, retrieval, quantiles)
    held_views = PromptViews(held_out, stacked, ridge.to_target(stacked))
    encoding = _train_encoding(samples, dense, target, held_views, rng)
    if only_arrival:
        return Models(arrival, encoding, ())
    asked = dense[:, ASKED]
    answers = (
        _train_answers(samples, lengths, asked, held_views, age, rng) for age in _ANSWER_AGES
    )
    return Models(arrival, encoding, tuple(model for model in answers if model is not None))


def _train_encoding(
    samples: Sequence[Sample],
    dense: Array,
    target: Array,
    held_views: PromptViews,
    rng: np.random.Generator,
) -> EncodingModel | None:
    """Fit on the samples with an encoding, and put its views in place of theirs."""
    which, encodings = _known([sample.prompt.encoding for sample in samples])
    if len(which) < _MIN_ENCODINGS:
        return None
    dense, target, by_look_ups = dense[which], target[which], held_views.ranks[which]
    groups = np.arange(len(which))
    ridge, ranks = fit_encoding_ridge(encodings, by_look_ups, target, groups, np.zeros_like(groups))
    columns = _encoding_columns(dense, ranks, by_look_ups)
    quantiles, held_out = fit_quantiles(columns, target, groups, _ARRIVAL_DEPTH, rng)
    before = pinball(held_views.log_quantiles[which], target)
    if pinball(held_out, target).mean() >= before.mean():
        return None
    model = EncodingModel(ridge, targets_of(target), quantiles)
    held_views.replace(which, held_out, ranks, model.targets)
    return model


def _train_answers(
    samples: Sequence[Sample],
    lengths: npt.NDArray[np.float64],
    asked: Array,
    held_views: PromptViews,
    from_tokens: int,
    rng: np.random.Generator,
) -> AnswerModel | None:
    pairs = [
        (index, snapshot)
        for index, sample in enumerate(samples)
        for snapshot in sample.snapshots
        if from_tokens <= snapshot.output_tokens < lengths[index]
    ][-_MAX_ANSWER_ROWS:]
    if len(pairs) < _MIN_ANSWER_ROWS:
        return None
    groups = np.array([index for index, _ in pairs])
    answers = np.stack([snapshot.dense for _, snapshot in pairs]).astype(np.float32)
    rows = answer_rows(answers, asked[groups], held_views.ranks[groups], held_views.logs[groups])
    bags = bag_matrix([snapshot.bag for _, snapshot in pairs])
    written = np.array([snapshot.output_tokens for _, snapshot in pairs])
    target = np.log(np.maximum(lengths[groups] - written, 1.0)).astype(np.float32)
    ridge, own = fit_ridge(
        rows, bags, target, groups, written, _ANSWER_BLOCKS, _ANSWER_LANDMARKS, rng
    )
    which, encodings = _known([samples[index].prompt.encoding for index in groups])
    encoding_ridge = None
    if len(which) >= _MIN_ANSWER_ROWS:
        encoding_ridge, own[which] = fit_encoding_ridge(
            encodings, own[which], target[which], groups[which], written[which]
        )
    columns = _answer_columns(rows, own)
    quantiles, held_out = fit_quantiles(columns, target, groups, DEPTH, rng)
    rival = conditioned(held_views.log_quantiles[groups], written)
    share = best_share(rival, held_out, target)
    return AnswerModel(from_tokens, ridge, encoding_ridge, quantiles, share)


def best_share(by_prompt: Array, by_answer: Array, target: Array) -> float:
    """Return the share of `by_answer` in a blend of log-quantiles with the least pinball loss."""
    losses = [
        float(pinball(by_prompt + np.float32(share) * (by_answer - by_prompt), target).mean())
        for share in _SHARES
    ]
    return _SHARES[int(np.argmin(losses))]


def marginal_quantiles(lengths: npt.NDArray[np.float64]) -> Array:
    """Return log-quantiles [levels] of the lengths themselves: what any model must beat."""
    known = np.log(np.maximum(lengths[np.isfinite(lengths)], 1.0))
    quantiles: Array = np.quantile(known, QUANTILE_LEVELS).astype(np.float32)
    return quantiles
