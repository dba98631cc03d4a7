"""What is compared in a simulation: policies and how they preempt. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from alise_scheduler.policy import Policy


@dataclass(frozen=True, slots=True)
class SimulatedSystem:
    """One column of the comparison; None as policy is stock vLLM."""

    name: str
    policy: Policy | None
    has_tier: bool = True
    """Whether preempted KV is kept on the host, where the profile has a tier."""
    preempts: bool = True
    is_oracle: bool = False
    """Told the true lengths, whatever the predictor."""
    gamma_per_s: float | None = None
    """None: the rule that serves."""
    first_tokens: int = 0
    """Every new job is let out this many tokens early."""


_MEAN_GAMMA_PER_S: Final = 1e-4
"""So small that whoever came when hardly matters: set for the mean alone, as the paper's policy."""

FCFS: Final = SimulatedSystem("fcfs", None)
ALISE: Final = SimulatedSystem("alise", Policy.BOOST)

SYSTEMS: Final = {
    system.name: system
    for system in (
        FCFS,
        ALISE,
        SimulatedSystem("alise-recompute", Policy.BOOST, has_tier=False),
        SimulatedSystem("alise-oracle", Policy.BOOST, is_oracle=True),
        SimulatedSystem("alise-early", Policy.BOOST, first_tokens=8),
        SimulatedSystem("alise-no-preempt", Policy.BOOST, preempts=False),
        SimulatedSystem("alise-mean", Policy.BOOST, gamma_per_s=_MEAN_GAMMA_PER_S),
        SimulatedSystem(
            "alise-mean-oracle", Policy.BOOST, is_oracle=True, gamma_per_s=_MEAN_GAMMA_PER_S
        ),
        SimulatedSystem("boost-attained", Policy.BOOST_ATTAINED),
        SimulatedSystem("srtf", Policy.SRTF),
        SimulatedSystem("srtf-oracle", Policy.SRTF, is_oracle=True),
        SimulatedSystem("srtf-aging", Policy.SRTF_AGING),
        SimulatedSystem("mlfq", Policy.MLFQ),
        SimulatedSystem("shortest-first", Policy.SRTF, preempts=False),
    )
}
"""All baselines of docs/simulate.md, by the names that users give on the command line."""
