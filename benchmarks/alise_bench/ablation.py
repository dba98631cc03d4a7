"""What each group of features gives: the predictor's figures when it learns without the group.

A group is wiped from the jobs that the predictor learns from. What never varied there gets no
weight in a model, so all the rest runs as it serves. Does not know how models use features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from alise_scheduler.answer_features import ANSWER_LEXICAL, LINES
from alise_scheduler.evaluation import Conversation, NoModelError, Report, evaluate
from alise_scheduler.prompt_features import ASKED, LEXICAL, NUMERIC, PromptFeatures
from alise_scheduler.token_table import DIMENSIONS
from alise_scheduler.tracked_job import TrackedJob
from alise_scheduler.training import Snapshot

TRAIN_SHARE: Final = 0.7
_NO_WORDS: Final = np.empty(0, dtype=np.uint16)

_Features = TypeVar("_Features", PromptFeatures, Snapshot)


@dataclass(frozen=True, slots=True)
class Group:
    """Some columns of the prompt's or the answer's features, or (None) their bag of words."""

    name: str
    of_prompt: bool
    columns: slice | None
    is_encoding: bool = False
    """Instead: what the prompt encoder says."""

    def wipe(self, job: TrackedJob) -> None:
        """Take the group out of a job that has ended."""
        if self.is_encoding:
            job.features = replace(job.features, encoding=None)
        elif self.of_prompt:
            job.features = self._without(job.features)
        else:
            job.snapshots = [self._without(snapshot) for snapshot in job.snapshots]

    def _without(self, features: _Features) -> _Features:
        if self.columns is None:
            return replace(features, bag=_NO_WORDS)
        dense = features.dense.copy()
        dense[self.columns] = 0
        return replace(features, dense=dense)


def _vectors(number: int) -> slice:
    return slice(LEXICAL + number * DIMENSIONS, LEXICAL + (number + 1) * DIMENSIONS)


GROUPS: Final = (
    Group("prompt: sizes, structure, sampling parameters", True, slice(0, ASKED)),
    Group("prompt: number of items asked for", True, slice(ASKED, NUMERIC)),
    Group("prompt: counts of kinds of tokens", True, slice(NUMERIC, LEXICAL)),
    Group("prompt: the model's embeddings, opening", True, _vectors(0)),
    Group("prompt: token meanings, all", True, _vectors(1)),
    Group("prompt: token meanings, opening", True, _vectors(2)),
    Group("prompt: words and pairs of words", True, None),
    Group("prompt: its encoding", True, None, is_encoding=True),
    Group("answer: its lines and lists", False, LINES),
    Group("answer: counts of kinds of tokens", False, slice(LINES.stop, ANSWER_LEXICAL)),
    Group("answer: the model's embeddings", False, slice(ANSWER_LEXICAL, None)),
    Group("answer: words and pairs of words", False, None),
)


def ablation(
    conversations: Sequence[Conversation],
    table: Path,
    seeds: int,
    groups: Sequence[Group] = GROUPS,
    on_split: Callable[[], Any] = lambda: None,
) -> Iterator[tuple[str, Report | None]]:
    """Yield the figures with all groups, then without each in turn.

    None: without it, a split gave no model, as none beat the mere distribution of the lengths.

    Raises:
        NoModelError: there is none with all groups.
    """
    yield "all", evaluate(conversations, table, TRAIN_SHARE, seeds, on_split)
    for group in groups:
        report = None
        with suppress(NoModelError):
            report = evaluate(conversations, table, TRAIN_SHARE, seeds, on_split, group.wipe)
        yield group.name, report
