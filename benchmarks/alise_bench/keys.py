"""The key of a prompt: what recorded answers and true lengths are looked up by."""

from __future__ import annotations

from collections.abc import Sequence

from alise_scheduler.prompt_key import prompt_key
from alise_scheduler.protocol import bounded_token_ids


def key_of(prompt_ids: Sequence[int]) -> str:
    """Return the key of a whole prompt: that of the bounded prompt which the sidecar sees."""
    return prompt_key(bounded_token_ids(prompt_ids), len(prompt_ids))
