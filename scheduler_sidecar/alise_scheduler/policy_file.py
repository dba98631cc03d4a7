"""The policy from a file that may change while the sidecar runs, such as a mounted ConfigMap.

Knows the file's format and nothing of jobs. A file that cannot be read or says nonsense changes
nothing: the policy in use stays.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from alise_scheduler.engine_state import PolicySettings
from alise_scheduler.policy import Policy

_log = logging.getLogger(__name__)

POLL_S: Final = 2.0
_KNOBS: Final = {"policy", "gamma", "aging_s", "first_tokens"}


class PolicyFileError(ValueError):
    """The file says something that is not allowed; the text says what."""


def parse_policy(text: str, base: PolicySettings) -> PolicySettings:
    """Return `base` with the knobs of `text`, a JSON object of some of `_KNOBS`.

    Knobs that are absent have the sidecar's defaults. Raises `PolicyFileError`.
    """
    try:
        knobs = json.loads(text)
    except ValueError as error:
        raise PolicyFileError(f"not JSON: {error}") from error
    if not isinstance(knobs, dict) or (unknown := knobs.keys() - _KNOBS):
        detail = f", not {', '.join(sorted(unknown))}" if isinstance(knobs, dict) else ""
        raise PolicyFileError(f"allowed is an object of {', '.join(sorted(_KNOBS))}{detail}")
    defaults = PolicySettings()
    try:
        policy = Policy(knobs.get("policy", defaults.policy.value))
    except ValueError as error:
        allowed = ", ".join(policy.value for policy in Policy)
        raise PolicyFileError(f"policy {knobs['policy']!r}: allowed are {allowed}") from error
    gamma = knobs.get("gamma")
    return replace(
        base,
        policy=policy,
        gamma_per_s=None if gamma is None else _positive("gamma", gamma),
        aging_s=_positive("aging_s", knobs.get("aging_s", defaults.aging_s)),
        first_tokens=_count("first_tokens", knobs.get("first_tokens", defaults.first_tokens)),
    )


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1_000_000:
        raise PolicyFileError(f"{name} {value!r}: allowed are whole numbers, 0 to 1000000")
    return value


def _positive(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1e-6 <= value <= 1e6 or math.isnan(value):
        raise PolicyFileError(f"{name} {value!r}: allowed are 1e-06 to 1e+06")
    return float(value)


@dataclass(slots=True)
class PolicyFile:
    """Follows one file."""

    path: Path | None
    """None: there is none, and nothing changes."""
    settings: PolicySettings
    """In use; at first, what the command line said."""
    _text: str | None = None

    def refresh(self) -> bool:
        """Read the file again; returns whether `settings` has changed."""
        if self.path is None:
            return False
        try:
            text = self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            _log.debug("policy file %s: %s", self.path, error)
            return False
        if text == self._text:
            return False
        self._text = text
        try:
            settings = parse_policy(text, self.settings)
        except PolicyFileError as error:
            _log.error("policy file %s: %s; the policy stays as it is", self.path, error)
            return False
        has_changed = settings != self.settings
        self.settings = settings
        return has_changed
