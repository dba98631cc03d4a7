"""Which images a service runs: the user's, or the operator's defaults as first used.

Pure. Defaults are pinned in status, so that an upgrade of the operator, which brings new defaults,
restarts no pod by itself. Does not know when pods are restarted anyway, and the pins are given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alise_operator.api.service import ALISEServiceSpec
from alise_operator.api.status import ResolvedImages


@dataclass(frozen=True, slots=True)
class DefaultImages:
    """Images of services that name none."""

    engine: str
    engine_cpu: str
    """For services without accelerators."""
    predictor: str


def resolve_images(
    spec: ALISEServiceSpec, pinned: Mapping[str, Any], defaults: DefaultImages
) -> ResolvedImages:
    """Return the images of a service; `pinned` is its `status.resolvedImages`, or empty."""
    accelerated = spec.engine.accelerator.count > 0
    engine = defaults.engine if accelerated else defaults.engine_cpu
    return ResolvedImages(
        engine=spec.engine.image or pinned.get("engine") or engine,
        predictor=spec.predictor.image or pinned.get("predictor") or defaults.predictor,
        revision=spec.rollout.revision,
        accelerated=accelerated,
    )
