"""Models of the very data set that is simulated, none of which learned from what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from alise_scheduler.conversations import encoded
from alise_scheduler.evaluation import Conversation, trained_on
from alise_scheduler.lengths import Quantiles
from alise_scheduler.predictor import Outcome, Predictor, PromptInput, TrackedJob

from alise_bench.dataset import Item
from alise_bench.errors import BenchError
from alise_bench.simulation.predictors import simulated_prompt, token_table


@dataclass(frozen=True, slots=True)
class FoldPrompt:
    """What is kept of a prompt: the fold that it is in, and what the prompt encoder reads in it."""

    fold: int
    encoding: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class _FoldJob:
    fold: int
    tracked: TrackedJob

    def extend(self, new_token_ids: Sequence[int], output_tokens: int) -> None:
        self.tracked.extend(new_token_ids, output_tokens)


class CrossFittedPredictor:
    """Cross-fitting: each prompt is predicted by models that learned from the other folds alone."""

    model_version: Final = 1

    def __init__(
        self, predictors: Sequence[Predictor], prompts: Mapping[bytes, FoldPrompt]
    ) -> None:
        """Take a predictor for each fold, and the prompts by their token ids' bytes (int32)."""
        self._predictors = predictors
        self._prompts = prompts

    def fold_of(self, prompt: PromptInput) -> int:
        """Return the fold that a prompt is in, whose models did not learn from it."""
        return self._prompts[prompt.token_ids.tobytes()].fold

    def track(self, prompt: PromptInput) -> Any:
        """Begin to follow a job."""
        fold = self.fold_of(prompt)
        return _FoldJob(fold, self._predictors[fold].track(prompt))

    def encode(self, prompt: PromptInput, job: Any, then: Callable[[], None]) -> None:
        """Give the encoding at once: what a sidecar takes for it is little beside a wait."""
        encoding = self._prompts[prompt.token_ids.tobytes()].encoding
        if encoding is not None:
            job.tracked.set_encoding(encoding)
            then()

    def predict(self, jobs: Sequence[Any]) -> list[Quantiles | None]:
        """Return quantiles of each job's remaining length, tokens."""
        result: list[Quantiles | None] = [None] * len(jobs)
        for fold, predictor in enumerate(self._predictors):
            mine = [i for i, job in enumerate(jobs) if job.fold == fold]
            told = predictor.predict([jobs[i].tracked for i in mine])
            for i, quantiles in zip(mine, told, strict=True):
                result[i] = quantiles
        return result

    def observe(self, job: Any, outcome: Outcome) -> None:
        """Learn nothing, so that each system of a comparison meets the same predictor."""


def cross_fitted(
    items: Sequence[Item],
    folds: int,
    model: Path,
    on_encoded: Callable[[], Any] = lambda: None,
    on_trained: Callable[[], Any] = lambda: None,
) -> CrossFittedPredictor:
    """Return models of `items` in random folds; `model` is the folder of the served model.

    `on_encoded` is called after each prompt, `on_trained` after each fold. Raises `BenchError`.
    """
    with token_table(model) as table:
        conversations = encoded([_conversation(item) for item in items], table, on_encoded)
        return fit_folds(conversations, folds, table, on_trained)


def fit_folds(
    conversations: Sequence[Conversation],
    folds: int,
    table: Path,
    on_trained: Callable[[], Any] = lambda: None,
) -> CrossFittedPredictor:
    """Return models of `conversations`, whose prompts differ; `table` is their token table.

    Raises `BenchError` if a fold's models tell nothing.
    """
    fold_of = np.random.default_rng(0).permutation(len(conversations)) % folds
    predictors = []
    for fold in range(folds):
        others = [conversations[i] for i in np.flatnonzero(fold_of != fold)]
        predictors.append(trained_on(others, table))
        if predictors[-1].model_version == 0:
            raise BenchError(
                f"--folds {folds}: no model of {len(others)} rows is better than the plain "
                "distribution of their lengths; more rows are needed"
            )
        on_trained()
    prompts = {
        conversation.prompt.token_ids.tobytes(): FoldPrompt(int(fold), conversation.encoding)
        for conversation, fold in zip(conversations, fold_of, strict=True)
    }
    return CrossFittedPredictor(predictors, prompts)


def _conversation(item: Item) -> Conversation:
    prompt = simulated_prompt(0, len(item.prompt_ids), item.output_tokens, item.prompt_ids)
    return Conversation(prompt, item.answer_ids)
