"""The load: each request is sent at its time, whatever became of the others (open loop).

Requests go over HTTP as token ids to the OpenAI-compatible `/v1/completions`, streamed, with the
same sampling parameters for all; the time of every token is kept. Knows nothing of policies.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from alise_bench.dataset import Item
from alise_bench.metrics import RequestRow

# No token for this long is a failure: far above any wait that a sound run has.
READ_TIMEOUT_S: Final = 900.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the load."""

    item: Item
    arrival_s: float
    priority: int = 0
    """vLLM's `priority` field; only the `priority-oracle` system reads it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    row: RequestRow
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None


async def run_load(
    base_url: str,
    model: str,
    asks: Sequence[Ask],
    max_tokens: int,
    on_done: Callable[[], None] = lambda: None,
    max_concurrency: int | None = None,
) -> list[Answer]:
    """Send all `asks` and return their answers, in the order of `asks`.

    With `max_concurrency` at most so many are under way at once (closed loop), and a request's
    arrival is when its turn came.
    """
    gate = asyncio.Semaphore(max_concurrency or len(asks) or 1)
    # A connection each: a server may close an idle one just as the next request goes out on it.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(30.0, read=READ_TIMEOUT_S, pool=None)
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=timeout) as http:
        start = time.perf_counter()

        async def ask_in_time(ask: Ask) -> Answer:
            await asyncio.sleep(max(0.0, start + ask.arrival_s - time.perf_counter()))
            async with gate:
                arrival = time.perf_counter() - start if max_concurrency else ask.arrival_s
                answer = await _ask(http, model, ask, arrival, start, max_tokens)
            on_done()
            return answer

        return list(await asyncio.gather(*(ask_in_time(ask) for ask in asks)))


async def _ask(
    http: httpx.AsyncClient, model: str, ask: Ask, arrival_s: float, start: float, max_tokens: int
) -> Answer:
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ask.item.prompt_ids),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "return_token_ids": True,
    }
    if ask.priority:
        body["priority"] = ask.priority
    sent_s = time.perf_counter() - start
    stream = _Stream(start)
    error: str | None = None
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                error = f"HTTP {response.status_code}: {(await response.aread())[:300]!r}"
            else:
                async for line in response.aiter_lines():
                    stream.read(line)
                error = stream.error
    except (httpx.HTTPError, ValueError) as failure:
        error = repr(failure)
    if error is None and stream.finish_reason is None:
        error = "the stream ended before the answer did"
    row = RequestRow(
        id=ask.item.id,
        arrival_s=arrival_s,
        sent_s=sent_s,
        token_s=tuple(stream.token_s),
        finish_s=time.perf_counter() - start,
        prompt_tokens=len(ask.item.prompt_ids),
        error=error,
    )
    return Answer(row, tuple(stream.token_ids), "".join(stream.texts), stream.finish_reason)


class _Stream:
    """Gathers tokens and their times from server-sent events."""

    def __init__(self, start: float) -> None:
        self._start = start
        self.token_s: list[float] = []
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        self.error: str | None = None

    def read(self, line: str) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        now_s = round(time.perf_counter() - self._start, 5)
        event = json.loads(line[6:])
        if "choices" not in event:
            self.error = f"the server reported: {line[6:300]}"
            return
        for choice in event["choices"]:
            ids = choice.get("token_ids") or []
            self.token_ids.extend(ids)
            self.token_s.extend([now_s] * len(ids))
            self.texts.append(choice["text"])
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
