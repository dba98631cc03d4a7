"""Hardware profiles: what a replica can do, as JSON. `alise profile` measures one.

Packaged ones (data/profiles/*.json) say where their figures come from.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from alise_scheduler.cost_model import StepCost
from alise_scheduler.replica import Hardware

from alise_bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """The KV tier of a replica."""

    store_s_per_token: float
    load_s_per_token: float
    host_tokens: int
    """How much KV the host holds."""
    is_in_step: bool
    """Whether copies take the engine's time (CPU), or run beside it (GPU)."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of replica."""

    name: str
    source: str
    """Where the figures come from: measured by whom, or derived from what."""
    hardware: Hardware
    tier: TierSpeed | None


def packaged_profiles() -> list[str]:
    """Return the names of the profiles that come with the package."""
    folder = resources.files("alise_bench") / "data" / "profiles"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir())


def load_profile(name: str) -> Profile:
    """Read a packaged profile by name, or a file. Raises `BenchError`."""
    if name in packaged_profiles():
        file = Path(str(resources.files("alise_bench") / "data" / "profiles" / f"{name}.json"))
    else:
        file = Path(name)
    try:
        return _profile(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        known = ", ".join(packaged_profiles())
        raise BenchError(f"--profile {name}: neither a file nor one of {known}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"--profile {name}: not a profile: {error!r}") from error


def save_profile(profile: Profile, file: Path) -> None:
    """Write a profile."""
    file.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")


def _profile(value: dict[str, Any]) -> Profile:
    hardware = dict(value["hardware"])
    step = StepCost(**hardware.pop("step"))
    tier = value.get("tier")
    return Profile(
        name=str(value["name"]),
        source=str(value["source"]),
        hardware=Hardware(step=step, **hardware),
        tier=None if tier is None else TierSpeed(**tier),
    )
