"""What both ends of the contract must agree on beside the .proto: its version and its limits.

Pure, imported by the sidecar and by the engine's client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

PROTOCOL_VERSION: Final = 1
SERVICE_NAME: Final = "alise.scheduler.v1.Scheduler"

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Of one message, in either direction."""
MAX_EVENTS: Final = 4096
"""In one EngineMessage; the jobs and progress entries of a Snapshot count as events."""
PROMPT_HEAD_TOKENS: Final = 512
PROMPT_TAIL_TOKENS: Final = 512
"""A longer prompt travels as its first and last tokens."""
MAX_PROMPT_TOKEN_IDS: Final = PROMPT_HEAD_TOKENS + PROMPT_TAIL_TOKENS
MAX_NEW_TOKEN_IDS: Final = 1024
"""In one JobProgress or JobFinished; of more, the newest travel."""
MAX_TOKEN_ID: Final = 2**31 - 1
MAX_NAME_CHARS: Final = 256
"""Of a job id, an engine id or a LoRA name."""
MAX_PREDICT_PROMPTS: Final = 1024
MAX_TIMED_PROMPTS: Final = 16
"""Of a PredictRequest with `with_times`: each looks at the whole queue."""
MAX_LIVE_JOBS: Final = 100_000
"""Of one engine; jobs beyond it get no estimates and so keep their arrival order."""
MAX_ENGINES: Final = 64
HEARTBEAT_S: Final = 0.5
"""The sidecar sends something at least this often: an engine that hears nothing for several of
them takes the sidecar for hung, and orders by arrival."""
MIN_PING_INTERVAL_MS: Final = 500
"""Keep-alive pings of the client may come no faster than this."""


def bounded_token_ids(token_ids: Sequence[int]) -> Sequence[int]:
    """Return what a `Prompt` carries of its token ids: all of a short one, else both ends."""
    if len(token_ids) <= MAX_PROMPT_TOKEN_IDS:
        return token_ids
    return [*token_ids[:PROMPT_HEAD_TOKENS], *token_ids[-PROMPT_TAIL_TOKENS:]]
