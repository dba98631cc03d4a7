"""What the engine tells the sidecar, as plain records, and how they become messages.

The scheduler thread only makes the records (references, no copies of token ids); the stream's
own thread turns them into protobuf. A job whose id (a client may choose it) is longer than the
contract allows is not told of, so it keeps its place by arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from alise_scheduler import protocol
from alise_scheduler.events import Preempted, Progress, StepTiming
from alise_scheduler.v1 import scheduler_pb2 as pb


@dataclass(frozen=True, slots=True)
class Arrived:
    """A job that has just been queued."""

    job_id: str
    arrival_s: float
    prompt_token_ids: Sequence[int]
    max_tokens: int
    temperature: float
    stop_strings: int
    lora_name: str
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A job that ended, however it did."""

    job_id: str
    reason: pb.FinishReason.ValueType
    output_tokens: int
    new_token_ids: Sequence[int]
    finish_s: float
    first_token_s: float
    preemptions: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All live jobs; the first thing that a new stream carries."""

    jobs: Sequence[Arrived] = field(default_factory=tuple)
    progress: Sequence[Progress] = field(default_factory=tuple)


EngineEvent: TypeAlias = Arrived | Progress | Preempted | Finished | StepTiming | Snapshot

_JOBS_PER_SNAPSHOT = 500


def to_messages(event: EngineEvent) -> list[pb.Event]:
    """Return the protobuf events that carry `event`; a snapshot may take several.

    None for a job that can't be named.
    """
    if isinstance(event, Snapshot):
        return _snapshot(event)
    if not isinstance(event, StepTiming) and not _is_nameable(event.job_id):
        return []
    if isinstance(event, Arrived):
        return [pb.Event(arrived=_arrived(event))]
    if isinstance(event, Progress):
        return [pb.Event(progress=_progress(event))]
    if isinstance(event, Preempted):
        return [
            pb.Event(
                preempted=pb.JobPreempted(job_id=event.job_id, output_tokens=event.output_tokens)
            )
        ]
    if isinstance(event, Finished):
        return [pb.Event(finished=_finished(event))]
    return [
        pb.Event(
            step=pb.StepTiming(
                prefill_tokens=event.prefill_tokens,
                decode_jobs=event.decode_jobs,
                context_tokens=event.context_tokens,
                duration_s=event.duration_s,
                decoded_tokens=event.decoded_tokens,
                waiting_jobs=event.waiting_jobs,
            )
        )
    ]


def _is_nameable(job_id: str) -> bool:
    return len(job_id) <= protocol.MAX_NAME_CHARS


def _snapshot(event: Snapshot) -> list[pb.Event]:
    nameable = [job for job in event.jobs if _is_nameable(job.job_id)]
    starts = range(0, max(len(nameable), 1), _JOBS_PER_SNAPSHOT)
    progress_of = {item.job_id: item for item in event.progress}
    parts = []
    for start in starts:
        jobs = nameable[start : start + _JOBS_PER_SNAPSHOT]
        parts.append(
            pb.Event(
                snapshot=pb.Snapshot(
                    jobs=[_arrived(job) for job in jobs],
                    progress=[
                        _progress(progress_of[job.job_id])
                        for job in jobs
                        if job.job_id in progress_of
                    ],
                    is_last=start == starts[-1],
                )
            )
        )
    return parts


def _arrived(event: Arrived) -> pb.JobArrived:
    return pb.JobArrived(
        job_id=event.job_id,
        arrival_s=event.arrival_s,
        prompt=pb.Prompt(
            token_ids=protocol.bounded_token_ids(event.prompt_token_ids),
            prompt_tokens=len(event.prompt_token_ids),
            max_tokens=event.max_tokens,
            temperature=event.temperature,
            stop_strings=event.stop_strings,
            lora_name=event.lora_name[: protocol.MAX_NAME_CHARS],
        ),
        cached_prompt_tokens=event.cached_prompt_tokens,
    )


def _progress(event: Progress) -> pb.JobProgress:
    return pb.JobProgress(
        job_id=event.job_id,
        output_tokens=event.output_tokens,
        new_token_ids=event.new_token_ids[-protocol.MAX_NEW_TOKEN_IDS :],
        is_running=event.is_running,
    )


def _finished(event: Finished) -> pb.JobFinished:
    return pb.JobFinished(
        job_id=event.job_id,
        reason=event.reason,
        output_tokens=event.output_tokens,
        new_token_ids=event.new_token_ids[-protocol.MAX_NEW_TOKEN_IDS :],
        finish_s=event.finish_s,
        first_token_s=event.first_token_s,
        preemptions=event.preemptions,
        cached_prompt_tokens=event.cached_prompt_tokens,
    )
