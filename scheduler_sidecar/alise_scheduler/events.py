"""What an engine tells about its jobs, as plain values: the contract without protobuf.

Pure. Instants are seconds on the engine's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from alise_scheduler.predictor import PromptInput


class FinishReason(str, Enum):
    """Why a job ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Arrived:
    """A job is waiting for its first slot."""

    job_id: str
    arrival_s: float
    prompt: PromptInput
    cached_prompt_tokens: int = 0
    """Of its prompt the prefix cache has so many, which need not be computed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A job's answer has grown to `output_tokens`; the newest ids of it."""

    job_id: str
    output_tokens: int
    new_token_ids: Sequence[int]
    is_running: bool


@dataclass(frozen=True, slots=True)
class Preempted:
    """A job has lost its slot."""

    job_id: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A job has ended."""

    job_id: str
    reason: FinishReason
    output_tokens: int
    new_token_ids: Sequence[int]
    finish_s: float = 0.0
    """0: not told."""
    first_token_s: float = 0.0
    """Since the arrival; 0: there was no token."""
    cached_prompt_tokens: int = 0
    """Found in the prefix cache when the job first got a slot."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One engine step: what ran in it, and how long it took."""

    prefill_tokens: int
    decode_jobs: int
    context_tokens: int
    """Sum over the jobs that decoded."""
    duration_s: float
    decoded_tokens: int = 0
    """With drafts: what the jobs that decoded got, in sum; 0: one token each."""
    waiting_jobs: int = 0
    """That had no place in it."""


@dataclass(frozen=True, slots=True)
class SnapshotEnd:
    """All live jobs have been named: any other is gone."""


Event: TypeAlias = Arrived | Progress | Preempted | Finished | SnapshotEnd | StepTiming
