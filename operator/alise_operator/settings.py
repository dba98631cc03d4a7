"""What the operator's process is told at start."""

from __future__ import annotations

from dataclasses import dataclass

from alise_operator.images import DefaultImages


@dataclass(frozen=True, slots=True)
class Settings:
    """Scope, names and limits of one operator process."""

    images: DefaultImages
    namespaces: tuple[str, ...]
    """Namespaces to serve; empty: the whole cluster."""
    peering: str | None
    """Name of the peering object that guards against a second operator; None: no guard."""
    priority: int
    """Of two operators, the one with the higher priority works."""
    identity: str
    """Name of this process among peers."""
    port: int
    """Port of health and metrics; 0 lets the system choose."""
    workers: int
    """Services reconciled at once."""
    discovery_s: float
    """Time between looks for optional APIs that came or went, seconds."""
    audit_s: float
    """Time between audits for missed changes, seconds."""
