"""Between protobuf messages and plain values, with every limit of the contract checked.

Pure but for protobuf's own types. A message is checked whole before anything of it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler import protocol
from alise_scheduler.engine_state import Update
from alise_scheduler.events import (
    Arrived,
    Event,
    Finished,
    FinishReason,
    Preempted,
    Progress,
    SnapshotEnd,
    StepTiming,
)
from alise_scheduler.lengths import Quantiles
from alise_scheduler.predictor import PromptInput
from alise_scheduler.v1 import scheduler_pb2 as pb

_REASON_OF: Final = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORTED: FinishReason.ABORTED,
}


class InvalidMessageError(ValueError):
    """A message breaks a limit or the order of the contract; its text says which."""


def hello_from(message: pb.EngineMessage) -> pb.Hello:
    """Return the Hello that must open a stream; raises `InvalidMessageError`."""
    if not message.events or message.events[0].WhichOneof("body") != "hello":
        raise InvalidMessageError("the first event of a stream must be Hello")
    hello = message.events[0].hello
    _check_name("Hello.engine_id", hello.engine_id)
    return hello


def events_from(message: pb.EngineMessage) -> list[Event]:
    """Return the events of `message` but for Hello; a Snapshot becomes its parts.

    Raises `InvalidMessageError`.
    """
    _check_count(message)
    return [event for item in message.events for event in _events_of(item)]


def prompt_from(prompt: pb.Prompt) -> PromptInput:
    """Return a checked prompt; raises `InvalidMessageError`."""
    if len(prompt.token_ids) > protocol.MAX_PROMPT_TOKEN_IDS:
        raise InvalidMessageError(
            f"Prompt.token_ids has {len(prompt.token_ids)} ids; allowed are "
            f"{protocol.MAX_PROMPT_TOKEN_IDS}: the first and last 512 of a longer prompt"
        )
    if len(prompt.lora_name) > protocol.MAX_NAME_CHARS:
        raise InvalidMessageError(
            f"Prompt.lora_name has {len(prompt.lora_name)} characters; "
            f"allowed are {protocol.MAX_NAME_CHARS}"
        )
    return PromptInput(
        token_ids=_token_ids("Prompt.token_ids", prompt.token_ids),
        prompt_tokens=max(prompt.prompt_tokens, len(prompt.token_ids)),
        max_tokens=prompt.max_tokens,
        temperature=_finite("Prompt.temperature", prompt.temperature),
        stop_strings=prompt.stop_strings,
        lora_name=prompt.lora_name,
    )


def update_message(update: Update) -> pb.SidecarMessage:
    """Return the message that carries `update`."""
    body = pb.EstimateUpdate(
        model_version=update.model_version,
        estimates=[
            pb.Estimate(
                job_id=e.job_id,
                priority=e.priority,
                remaining_tokens=e.remaining_tokens,
                at_output_tokens=e.at_output_tokens,
            )
            for e in update.estimates
        ],
    )
    if update.rates is not None:
        body.cost_model.prefill_s_per_token = update.rates.prefill_s_per_token
        body.cost_model.decode_s_per_token = update.rates.decode_s_per_token
    return pb.SidecarMessage(update=body)


def prediction_message(quantiles: Quantiles | None) -> pb.Prediction:
    """Return the message that carries one prediction."""
    return pb.Prediction(quantiles_tokens=quantiles or ())


def _check_count(message: pb.EngineMessage) -> None:
    count = sum(
        1 + len(event.snapshot.jobs) + len(event.snapshot.progress) for event in message.events
    )
    if count > protocol.MAX_EVENTS:
        raise InvalidMessageError(
            f"EngineMessage has {count} events (a snapshot's jobs and progress count); "
            f"allowed are {protocol.MAX_EVENTS}"
        )


def _events_of(event: pb.Event) -> Iterator[Event]:
    kind = event.WhichOneof("body")
    if kind == "arrived":
        yield _arrived(event.arrived)
    elif kind == "progress":
        yield _progress(event.progress)
    elif kind == "preempted":
        yield Preempted(_job_id(event.preempted.job_id), event.preempted.output_tokens)
    elif kind == "finished":
        yield _finished(event.finished)
    elif kind == "step":
        yield StepTiming(
            prefill_tokens=event.step.prefill_tokens,
            decode_jobs=event.step.decode_jobs,
            context_tokens=event.step.context_tokens,
            duration_s=_finite("StepTiming.duration_s", event.step.duration_s),
            decoded_tokens=event.step.decoded_tokens,
            waiting_jobs=event.step.waiting_jobs,
        )
    elif kind == "snapshot":
        yield from (_arrived(job) for job in event.snapshot.jobs)
        yield from (_progress(progress) for progress in event.snapshot.progress)
        if event.snapshot.is_last:
            yield SnapshotEnd()


def _arrived(event: pb.JobArrived) -> Arrived:
    return Arrived(
        job_id=_job_id(event.job_id),
        arrival_s=_finite("JobArrived.arrival_s", event.arrival_s),
        prompt=prompt_from(event.prompt),
        cached_prompt_tokens=event.cached_prompt_tokens,
    )


def _progress(event: pb.JobProgress) -> Progress:
    return Progress(
        job_id=_job_id(event.job_id),
        output_tokens=event.output_tokens,
        new_token_ids=_new_token_ids(event.new_token_ids),
        is_running=event.is_running,
    )


def _finished(event: pb.JobFinished) -> Finished:
    return Finished(
        job_id=_job_id(event.job_id),
        reason=_REASON_OF.get(event.reason, FinishReason.ERROR),
        output_tokens=event.output_tokens,
        new_token_ids=_new_token_ids(event.new_token_ids),
        finish_s=_finite("JobFinished.finish_s", event.finish_s),
        first_token_s=_finite("JobFinished.first_token_s", event.first_token_s),
        cached_prompt_tokens=event.cached_prompt_tokens,
    )


def _new_token_ids(token_ids: Sequence[int]) -> list[int]:
    if len(token_ids) > protocol.MAX_NEW_TOKEN_IDS:
        raise InvalidMessageError(
            f"new_token_ids has {len(token_ids)} ids; allowed are "
            f"{protocol.MAX_NEW_TOKEN_IDS}: the newest ones"
        )
    ids: list[int] = _token_ids("new_token_ids", token_ids).tolist()
    return ids


def _token_ids(field: str, token_ids: Sequence[int]) -> npt.NDArray[np.int32]:
    ids = np.fromiter(token_ids, dtype=np.uint32, count=len(token_ids))
    if ids.size and ids.max() > protocol.MAX_TOKEN_ID:
        raise InvalidMessageError(
            f"{field} holds {ids.max()}; allowed are 0 to {protocol.MAX_TOKEN_ID}"
        )
    return ids.astype(np.int32)


def _job_id(job_id: str) -> str:
    _check_name("job_id", job_id)
    return job_id


def _check_name(field: str, name: str) -> None:
    if not 0 < len(name) <= protocol.MAX_NAME_CHARS:
        raise InvalidMessageError(
            f"{field} has {len(name)} characters; allowed are 1 to {protocol.MAX_NAME_CHARS}"
        )


def _finite(field: str, value: float) -> float:
    if not math.isfinite(value):
        raise InvalidMessageError(f"{field} is {value}; allowed are finite numbers")
    return value


class StreamOrder:
    """The order of a stream's events: Hello, then one Snapshot (in parts), then the rest."""

    def __init__(self) -> None:
        self._has_hello = False
        self._has_snapshot = False
        self._is_snapshot_whole = False

    def check(self, message: pb.EngineMessage) -> None:
        """Raise `InvalidMessageError` if the events of the next message are out of order."""
        for event in message.events:
            kind = event.WhichOneof("body")
            if kind == "hello":
                if self._has_hello:
                    raise InvalidMessageError("Hello may come only once, first in its stream")
                self._has_hello = True
            elif kind == "snapshot":
                if self._is_snapshot_whole:
                    raise InvalidMessageError("Snapshot may come only once, after Hello")
                self._has_snapshot = True
                self._is_snapshot_whole = event.snapshot.is_last
            elif not self._has_snapshot:
                raise InvalidMessageError("the second event of a stream must be Snapshot")
