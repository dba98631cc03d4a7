"""What the engine remembers of each live job beside vLLM's request, and the events made of it."""

from __future__ import annotations

import time

from alise_scheduler.events import Progress
from alise_scheduler.v1 import scheduler_pb2 as pb
from vllm.v1.request import Request, RequestStatus

from alise_engine.dispatch import OrderKey
from alise_engine.events import Arrived, Finished

_REASONS = {
    RequestStatus.FINISHED_STOPPED: pb.FINISH_REASON_STOP,
    RequestStatus.FINISHED_REPETITION: pb.FINISH_REASON_STOP,
    RequestStatus.FINISHED_LENGTH_CAPPED: pb.FINISH_REASON_LENGTH,
    RequestStatus.FINISHED_ABORTED: pb.FINISH_REASON_ABORTED,
}


class JobRecord:
    """What the scheduler remembers of a live job beside vLLM's own request."""

    __slots__ = (
        "arrival_s",
        "at_output_tokens",
        "cached_prompt_tokens",
        "class_",
        "first_token_s",
        "is_ranked",
        "key",
        "number",
        "priority",
        "remaining_tokens",
        "reported_tokens",
        "request",
    )

    def __init__(self, request: Request, class_: int, number: int, arrival_s: float) -> None:
        self.request = request
        self.class_ = class_
        self.number = number  # order of arrival: breaks ties
        self.arrival_s = arrival_s
        self.key: OrderKey
        self.rank(arrival_s)  # FCFS until the sidecar says otherwise
        self.is_ranked = False
        self.remaining_tokens: float | None = None
        self.at_output_tokens = 0
        self.reported_tokens = 0
        self.first_token_s = 0.0
        self.cached_prompt_tokens = 0

    def rank(self, priority: float) -> None:
        """Move the job in the order; whoever files it by its key must file it anew."""
        self.priority = priority
        self.key = (self.class_, priority, self.number)

    def expected_tokens(self) -> float | None:
        """Return the tokens still expected now; None when the policy needs no estimate."""
        if self.remaining_tokens is None:
            return None
        lived: int = self.request.num_output_tokens - self.at_output_tokens
        return max(self.remaining_tokens - lived, 1.0)


def arrived(record: JobRecord) -> Arrived:
    """Return the event of a job that has just been queued."""
    request, sampling = record.request, record.request.sampling_params
    lora = request.lora_request
    return Arrived(
        job_id=request.request_id,
        arrival_s=record.arrival_s,
        # Absent for a prompt of embeddings, and for the pooling of one.
        prompt_token_ids=request.prompt_token_ids or (),
        max_tokens=request.max_tokens,
        temperature=0.0 if sampling is None else sampling.temperature,
        stop_strings=0 if sampling is None else len(sampling.stop),
        lora_name="" if lora is None else lora.lora_name,
        cached_prompt_tokens=record.cached_prompt_tokens,
    )


def _take_new_token_ids(record: JobRecord) -> list[int]:
    """Return the answer's tokens that have not been reported, and count them as reported."""
    new_token_ids: list[int] = record.request.output_token_ids[record.reported_tokens :]
    record.reported_tokens += len(new_token_ids)
    return new_token_ids


def progress(record: JobRecord) -> Progress:
    """Return the event of what a job has put out since it was last reported."""
    request = record.request
    return Progress(
        job_id=request.request_id,
        new_token_ids=_take_new_token_ids(record),
        output_tokens=request.num_output_tokens,
        is_running=request.status == RequestStatus.RUNNING,
    )


def finished(record: JobRecord) -> Finished:
    """Return the event of a job that has just ended."""
    request = record.request
    return Finished(
        job_id=request.request_id,
        reason=_REASONS.get(request.status, pb.FINISH_REASON_ERROR),
        output_tokens=request.num_output_tokens,
        new_token_ids=_take_new_token_ids(record),
        finish_s=time.monotonic(),
        first_token_s=record.first_token_s,
        preemptions=request.num_preemptions,
        cached_prompt_tokens=record.cached_prompt_tokens,
    )
