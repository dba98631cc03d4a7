"""What the steps of one benchmark share, and how they send requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alise_bench.client import Answer, Ask, run_load
from alise_bench.dataset import Item, Split, split_for_repeat
from alise_bench.errors import BenchError
from alise_bench.progress import Progress
from alise_bench.settings import BenchSettings
from alise_bench.systems import SERVED_NAME, ServerSettings


@dataclass(frozen=True, slots=True)
class Session:
    """One benchmark under way."""

    settings: BenchSettings
    servers: ServerSettings
    items: tuple[Item, ...]
    plan: dict[str, Any]
    """What was chosen and measured so far (`store.open_plan`)."""
    progress: Progress

    @property
    def out(self) -> Path:
        """Return the benchmark's folder."""
        return self.settings.out

    def split(self, repeat: int) -> Split:
        """Return the prompts of one repeat."""
        s = self.settings
        return split_for_repeat(self.items, s.requests, repeat, s.seed)


def send(
    url: str,
    settings: BenchSettings,
    asks: Sequence[Ask],
    progress: Progress,
    max_concurrency: int | None = None,
) -> list[Answer]:
    """Send `asks` to the server at `url` (see `run_load`). Raises `BenchError` if all fail."""
    with progress.requests(len(asks)) as on_done:
        load = run_load(url, SERVED_NAME, asks, settings.max_tokens, on_done, max_concurrency)
        answers = asyncio.run(load)
    if all(answer.row.error is not None for answer in answers):
        raise BenchError(f"every request failed; the first: {answers[0].row.error}")
    return answers


def at_once(items: Sequence[Item]) -> list[Ask]:
    """Return a request for each item, all arriving at the start."""
    return [Ask(item, 0.0) for item in items]
