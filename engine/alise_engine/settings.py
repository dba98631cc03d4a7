"""What the engine's plug-ins need to know, read from `ALISE_*` environment variables.

The launcher sets them from its flags; `vllm serve --scheduler-cls` with the variables set by
hand works as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_DEFAULT_STALE_AFTER_S = 2.0
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class SettingsError(ValueError):
    """A variable has a value that is not allowed; the message names both and what is allowed."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for a sidecar that listens on TCP."""

    ca: Path | None
    certificate: Path | None
    key: Path | None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of the scheduler plug-in."""

    address: str | None
    """gRPC target of the sidecar (`unix:///path` or `host:port`); None: serve as stock vLLM."""
    shared_dir: Path | None
    """Pod-private folder shared with the sidecar, for the token table."""
    tls: TlsFiles | None
    preempts: bool
    margin_s: float | None
    """Dispatch's margin; None: what suits the engine's way of preempting."""
    stale_after_s: float
    """Estimates are dropped when the stream has been down for longer."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> EngineSettings:
        """Read and validate the settings; raises `SettingsError`."""
        stale_after_s = _seconds(environ, "ALISE_STALE_AFTER_S")
        return cls(
            address=environ.get("ALISE_SCHEDULER") or None,
            shared_dir=_path(environ, "ALISE_SHARED_DIR"),
            tls=_tls(environ),
            preempts=_boolean(environ, "ALISE_PREEMPTION", default=True),
            margin_s=_seconds(environ, "ALISE_PREEMPTION_MARGIN_S"),
            stale_after_s=_DEFAULT_STALE_AFTER_S if stale_after_s is None else stale_after_s,
        )


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    value = environ.get(name)
    return Path(value) if value else None


def _tls(environ: Mapping[str, str]) -> TlsFiles | None:
    files = TlsFiles(
        ca=_path(environ, "ALISE_SCHEDULER_TLS_CA"),
        certificate=_path(environ, "ALISE_SCHEDULER_TLS_CERT"),
        key=_path(environ, "ALISE_SCHEDULER_TLS_KEY"),
    )
    if (files.certificate is None) != (files.key is None):
        raise SettingsError(
            "ALISE_SCHEDULER_TLS_CERT and ALISE_SCHEDULER_TLS_KEY go together: set both or neither"
        )
    return files if files.ca or files.certificate else None


def _boolean(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    value = environ.get(name)
    if not value:
        return default
    if value.lower() not in _BOOLEANS:
        raise SettingsError(f"{name}={value!r}: allowed are {', '.join(_BOOLEANS)}")
    return _BOOLEANS[value.lower()]


def _seconds(environ: Mapping[str, str], name: str) -> float | None:
    value = environ.get(name)
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise SettingsError(f"{name}={value!r}: allowed are seconds, 0 or more")
    return seconds
