"""What a user can choose, validated."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from alise_bench.errors import BenchError
from alise_bench.systems import System


class Mode(str, Enum):
    """How answers end."""

    RECORDED = "recorded"
    """Each answer is the data set's recorded one, token for token."""
    NATURAL = "natural"
    """The model ends its answers by itself."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """One benchmark. Raises `BenchError` for values that cannot be."""

    out: Path
    model: Path
    dataset: Path
    mode: Mode
    systems: tuple[System, ...]
    requests: int
    repeats: int
    rates_per_s: tuple[float, ...]
    """Empty: chosen by `auto_load`, else `load_share`."""
    auto_load: float | None
    load_share: float
    trace: Path | None
    seed: int
    slots: int
    max_tokens: int
    max_model_len: int
    kv_cache_gib: int
    warmup: int
    unloaded_requests: int
    pace: str | None = None
    vllm_options: tuple[str, ...] = ()
    alise_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.systems)) != len(self.systems) or not self.systems:
            raise BenchError("--systems must name each system once, and at least one")
        if any(rate <= 0 for rate in self.rates_per_s):
            raise BenchError("--rates must be above 0, requests per second")
        if self.auto_load is not None and self.auto_load <= 1:
            raise BenchError("--auto-load must be above 1: it is a multiple of unloaded latency")
        if self.max_tokens >= self.max_model_len:
            raise BenchError(
                f"--max-tokens {self.max_tokens} leaves no room for a prompt in "
                f"--max-model-len {self.max_model_len}"
            )

    def as_plan(self) -> dict[str, Any]:
        """Return what must stay the same for runs to be compared, as JSON values.

        Systems and repeats may be added to a benchmark later.
        """
        return {
            "model": str(self.model),
            "dataset": str(self.dataset),
            "mode": self.mode.value,
            "requests": self.requests,
            "rates_per_s": list(self.rates_per_s),
            "auto_load": self.auto_load,
            "load_share": self.load_share,
            "trace": str(self.trace) if self.trace else None,
            "seed": self.seed,
            "slots": self.slots,
            "max_tokens": self.max_tokens,
            "max_model_len": self.max_model_len,
            "kv_cache_gib": self.kv_cache_gib,
            "warmup": self.warmup,
            "pace": self.pace,
            "vllm_options": list(self.vllm_options),
            "alise_options": list(self.alise_options),
        }
