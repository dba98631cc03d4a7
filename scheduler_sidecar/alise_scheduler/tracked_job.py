"""A live job as the predictor sees it: its prompt's features and running sums over its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Final

import numpy as np

from alise_scheduler.answer_features import AnswerState, answer_bag, answer_features
from alise_scheduler.lengths import Quantiles
from alise_scheduler.prompt_features import PromptInput, prompt_features
from alise_scheduler.token_table import TokenTable
from alise_scheduler.training import Array, Models, Sample, Snapshot

MILESTONES_TOKENS: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Outcome(Enum):
    """How a job ended."""

    COMPLETE = "complete"
    CENSORED = "censored"
    """Aborted or capped: the true length is at least the output."""


class TrackedJob:
    """A live job; `arrival` is what models said of its prompt, `first` what before its answer."""

    __slots__ = ("answer", "arrival", "features", "first", "max_tokens", "snapshots", "table")

    def __init__(self, prompt: PromptInput, table: TokenTable | None) -> None:
        self.max_tokens = max(prompt.max_tokens, 0)
        self.features = prompt_features(prompt, table)
        self.table = table
        self.answer = AnswerState()
        self.snapshots: list[Snapshot] = []
        # By whom; log-quantiles [levels] of the whole length; its rank, and the log that it means.
        self.arrival: tuple[Models, Array, float, float] | None = None
        self.first: Quantiles | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self.answer.output_tokens

    def set_encoding(self, encoding: Array) -> None:
        """Take the encoding of the prompt: from now on, predictions go by it, too."""
        self.features = replace(self.features, encoding=encoding)
        self.arrival = None

    def extend(self, new_token_ids: Sequence[int], output_tokens: int) -> None:
        """Note the answer's newest tokens; the last of them is number `output_tokens`.

        Ids may be missing (a gap) or repeated (those up to the present count are ignored).
        """
        done = self.answer.output_tokens
        first_new = output_tokens - len(new_token_ids)
        for milestone in MILESTONES_TOKENS:
            if done < milestone <= output_tokens:
                upto = max(milestone - first_new, 0)
                self.answer.extend(new_token_ids[:upto], milestone)
                self._snap()
        self.answer.extend(new_token_ids, output_tokens)

    def sample(self, outcome: Outcome) -> Sample:
        """Return what is to be learned from the job, ended with its present tokens."""
        is_censored = outcome is Outcome.CENSORED
        return Sample(self.features, tuple(self.snapshots), self.output_tokens, is_censored)

    def _snap(self) -> None:
        dense = answer_features([self.answer], self.table)[0]
        self.snapshots.append(
            Snapshot(self.answer.output_tokens, dense.astype(np.float16), answer_bag(self.answer))
        )
