"""Requests for real vLLM schedulers, and the loop that drives them as vLLM's engine core does."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

from alise_bench.scheduler_setup import BLOCK_SIZE, EOS_TOKEN_ID, answer
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

_numbers = itertools.count()


def create_request(
    *, prompt_tokens: int = 10, max_tokens: int = 500, priority: int = 0, **changes: Any
) -> Request:
    """Return a request with a prompt of its own, unless `prompt_token_ids` says which."""
    number = next(_numbers)
    own_prompt = [3 + (number + i) % 900 for i in range(prompt_tokens)]
    return Request(
        request_id=changes.pop("request_id", f"job-{number}"),
        prompt_token_ids=changes.pop("prompt_token_ids", own_prompt),
        sampling_params=SamplingParams(
            max_tokens=max_tokens, stop_token_ids=[EOS_TOKEN_ID], **changes
        ),
        pooling_params=None,
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


class Driver:
    """Runs a scheduler as vLLM's engine core does: with one batch in flight, or with two."""

    def __init__(self, scheduler: Scheduler, *, batches_in_flight: int = 1) -> None:
        self.scheduler = scheduler
        self._batches_in_flight = batches_in_flight
        self._in_flight: deque[SchedulerOutput] = deque()
        self.tokens: dict[str, int] = {}  # req_id -> tokens delivered
        self.finished: list[str] = []

    def step(self, stops: set[str] | None = None) -> SchedulerOutput:
        """Schedule one iteration; process the output of the oldest one when enough are under way.

        Jobs in `stops` end with the token of the iteration that is processed.
        """
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            self.scheduler.get_grammar_bitmask(output)  # asked once the batch is on its way
        self._in_flight.append(output)
        while len(self._in_flight) >= self._batches_in_flight:
            self._process(self._in_flight.popleft(), stops or set())
        return output

    def drain(self) -> None:
        """Process what is in flight."""
        while self._in_flight:
            self._process(self._in_flight.popleft(), set())

    def _process(self, output: SchedulerOutput, stops: set[str]) -> None:
        for client in answer(self.scheduler, output, stops).values():
            for item in client.outputs:
                self.tokens[item.request_id] = self.tokens.get(item.request_id, 0) + len(
                    item.new_token_ids
                )
                if item.finish_reason is not None:
                    self.finished.append(item.request_id)
