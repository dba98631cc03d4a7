"""What the operator's process is told at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from alise_operator.images import DefaultImages

DEFAULT_PORT: Final = 8080


@dataclass(frozen=True, slots=True)
class Settings:
    """Scope, names and limits of one operator process."""

    images: DefaultImages
    namespaces: tuple[str, ...] = ()
    """Namespaces to serve; empty: the whole cluster."""
    peering: str | None = None
    """Name of the peering object that guards against a second operator; None: no guard."""
    priority: int = 0
    """Of two operators, the one with the higher priority works."""
    identity: str = "alise-operator"
    port: int = DEFAULT_PORT
    """Port of health and metrics; 0 lets the system choose."""
    workers: int = 4
    """Services reconciled at once."""
    discovery_s: float = 30.0
    """Time between looks for optional APIs that came or went, seconds."""
    audit_s: float = 300.0
    """Time between audits for missed changes, seconds."""
