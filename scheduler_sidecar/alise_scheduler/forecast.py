"""What the models say of live jobs: quantiles of what remains of each. All in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.answer_features import answer_features
from alise_scheduler.conditioning import LARGEST_LOG, conditioned
from alise_scheduler.lengths import Quantiles
from alise_scheduler.prompt_features import ASKED
from alise_scheduler.tracked_job import TrackedJob
from alise_scheduler.training import Array, Models, answer_rows

_UNBOUNDED: Final = 1e9


def forecast(jobs: Sequence[TrackedJob], models: Models) -> list[Quantiles]:
    """Return quantiles of the *remaining* length of each of `jobs`; all of one token table.

    Notes in new jobs, and in those that other models saw, what `models` say of their prompts.
    """
    if not jobs:
        return []
    _look_at_prompts(jobs, models)
    arrivals = [job.arrival for job in jobs if job.arrival is not None]
    logs = np.array([arrival[1] for arrival in arrivals])
    lived = np.array([job.output_tokens for job in jobs])
    running = np.flatnonzero(lived)
    if len(running):
        logs[running] = conditioned(logs[running], lived[running])
    if models.answers:
        # Younger ones than any model has seen keep the prompt's distribution, conditioned.
        answered = np.flatnonzero(lived >= models.answers[0].from_tokens)
        if len(answered):
            some = [jobs[i] for i in answered]
            by_rank = np.array([arrivals[i][2:] for i in answered], dtype=np.float32)
            logs[answered] = _by_answers(some, lived[answered], models, by_rank, logs[answered])
    limits = [
        max(job.max_tokens - job.output_tokens, 1) if job.max_tokens else _UNBOUNDED for job in jobs
    ]
    lengths = np.exp(np.minimum(logs, LARGEST_LOG, dtype=np.float64))
    lengths = np.minimum(np.maximum(lengths, 1.0), np.array(limits, dtype=np.float64)[:, None])
    return list(map(tuple, lengths.tolist()))


def _look_at_prompts(jobs: Sequence[TrackedJob], models: Models) -> None:
    stale = [job for job in jobs if job.arrival is None or job.arrival[0] is not models]
    if not stale:
        return
    views = models.of_prompts([job.features for job in stale])
    ranks, means = views.ranks.tolist(), views.logs.tolist()
    for job, row, rank, log in zip(stale, views.log_quantiles, ranks, means, strict=True):
        job.arrival = (models, row, rank, log)


def _by_answers(
    jobs: Sequence[TrackedJob],
    lived: npt.NDArray[np.int64],
    models: Models,
    by_rank: Array,
    by_prompt: Array,
) -> Array:
    answers = answer_features([job.answer for job in jobs], jobs[0].table)
    asked = np.array([job.features.dense[ASKED] for job in jobs])
    rows = answer_rows(answers, asked, by_rank[:, 0], by_rank[:, 1])
    # Only now: the features have taken the newest tokens into the bags.
    bags = np.array([job.answer.bag for job in jobs])
    ends = [*(model.from_tokens for model in models.answers[1:]), _UNBOUNDED]
    logs: Array = by_prompt.copy()
    for model, end in zip(models.answers, ends, strict=True):
        own = np.flatnonzero((model.from_tokens <= lived) & (lived < end))
        if len(own):
            encodings = [jobs[i].features.encoding for i in own]
            logs[own] = model.predict(rows[own], bags[own], encodings, by_prompt[own])
    return logs
