"""Recorded mode: a vLLM logits processor that makes each answer the recorded one.

Bench only. It runs where logits are made (the model runner), looks the answer up by the digest
of the prompt's tokens and forces it token by token, end-of-sequence last. Nothing in a request
says which answer is meant or how long it is, and the scheduling side neither loads this module
nor reads its file. The model does all its work; only the choice of the token is taken from it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from alise_bench.keys import key_of
from alise_bench.replay_table import REPLAY_FILE_VARIABLE, read_replay_table

# Far above any logit, and finite: a softmax over it is exact, not NaN.
_FORCED_LOGIT: Final = 1e9


@dataclass(frozen=True, slots=True)
class _Job:
    answer: tuple[int, ...]
    output_ids: list[int]
    """vLLM's own list, which grows as tokens come out; after a recompute it is whole again."""

    @property
    def next_token(self) -> int:
        return self.answer[min(len(self.output_ids), len(self.answer) - 1)]


class ReplayRecordedAnswers(LogitsProcessor):  # type: ignore[misc]  # vLLM is Any to mypy
    """Forces recorded answers; a prompt without one is left to the model.

    The file named by the environment variable ALISE_BENCH_REPLAY_FILE holds the answers
    (`replay_table`).
    """

    def __init__(
        self,
        vllm_config: VllmConfig,  # noqa: ARG002  # vLLM's interface
        device: torch.device,
        is_pin_memory: bool,  # noqa: ARG002
    ) -> None:
        file = os.environ.get(REPLAY_FILE_VARIABLE)
        if not file:
            raise ValueError(f"{REPLAY_FILE_VARIABLE} must name the file of recorded answers")
        self._answers = read_replay_table(Path(file))
        self._device = device
        self._jobs: dict[int, _Job] = {}  # batch index -> job

    def is_argmax_invariant(self) -> bool:
        """Return False: the forced token is seldom the model's own."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, leave and move within the batch."""
        process_dict_updates(self._jobs, batch_update, self._new_job)

    def _new_job(
        self, _: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> _Job | None:
        answer = self._answers.get(key_of(prompt_ids)) if prompt_ids else None
        return _Job(answer, output_ids) if answer else None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Force the next recorded token of each job; `logits` is [requests, vocabulary]."""
        if self._jobs:
            rows = torch.tensor(list(self._jobs), device=self._device)
            tokens = [job.next_token for job in self._jobs.values()]
            logits[rows, torch.tensor(tokens, device=self._device)] = _FORCED_LOGIT
        return logits
