"""Jobs that have ended, as the sidecar remembers them: times and lengths, nothing of their content.

Pure. Instants are seconds on the engine's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HISTORY_JOBS: Final = 2_000
"""Of one engine; some 200 bytes each."""
HISTORY_STEPS: Final = 4_096


@dataclass(frozen=True, slots=True)
class PastJob:
    """A job that has ended."""

    arrival_s: float
    computed_prompt_tokens: int
    """Of its prompt, those that the prefix cache did not have; at least 1."""
    output_tokens: int
    finish_s: float
    """0: the engine did not tell."""
    is_complete: bool
    """False if the client went away or an error ended it."""
