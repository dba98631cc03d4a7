"""Dispatch: which running jobs make room for which waiting ones, in one engine iteration.

Pure: priorities and remaining-time estimates in, job ids out. It does not know how priorities
come about, and nothing of vLLM. It admits nobody: the engine admits in queue order; dispatch
only says whom to preempt first, so that there is a slot (and KV blocks) for a better job.

Invariants (tests/test_alise_engine_dispatch.py):

- a job that the sidecar has not ranked neither preempts nor is preempted, so without estimates
  the order is FCFS;
- a victim is behind its candidate by more than the margin, and has more work left than the
  candidate and the cost of preempting together: two jobs cannot evict each other in turn unless
  an estimate changes in between;
- a preemption saves its candidate more waiting than it costs: with many slots one is soon free
  anyway, and what a preemption costs (copies, or running prompt and answer again) slows the batch;
- nobody is preempted while there is room, nor when the candidate would still not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

OrderKey: TypeAlias = tuple[int, float, int]
"""Class (vLLM's own `priority`), then the sidecar's priority, then order of arrival."""


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that could be admitted now."""

    job_id: str
    key: OrderKey
    is_ranked: bool
    remaining_s: float | None
    """Expected work left; None when the policy needs no estimate."""
    blocks: int
    """KV blocks that admission takes."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that holds a slot."""

    job_id: str
    key: OrderKey
    is_ranked: bool
    remaining_s: float | None
    preemption_s: float
    """What preempting it would cost: swapping its KV out and in, or computing it again."""
    blocks: int
    is_preemptible: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What is free before anybody is preempted, and when slots become free by themselves."""

    slots: int
    blocks: int
    frees_s: Sequence[float] = ()
    """Expected seconds until each running job ends, ascending; shorter where that is unknown."""

    def wait_s(self, place: int) -> float:
        """Return how long the waiting job at `place` (0 is first) would wait for a slot."""
        return self.frees_s[place] if place < len(self.frees_s) else math.inf


SWAP_MARGIN_S = 0.25
"""Margin where KV is swapped: enough to keep noise in the estimates from moving jobs about."""
RECOMPUTE_MARGIN_S = 4.0
"""Margin where it is computed again: that delays all the batch, beyond what it costs itself."""


@dataclass(frozen=True, slots=True)
class DispatchParameters:
    """When a preemption is worth it (chosen by simulation: docs/policy.md)."""

    margin_s: float = RECOMPUTE_MARGIN_S
    """By this must a candidate be better placed, and so much waiting must it be saved, beyond
    the cost."""
    cost_weight: float = 2.0
    """Seconds of margin for each second that preempting costs: it slows all the batch."""
    protected_s: float = 1.0
    """A job with less work left than this is nearly done and keeps its slot."""
    max_preemptions_per_step: int = 4


def is_far_behind(victim: OrderKey, candidate: OrderKey, parameters: DispatchParameters) -> bool:
    """Say whether the order alone lets `candidate` preempt `victim`; cheap, asked in each step."""
    if candidate[0] != victim[0]:
        return candidate[0] < victim[0]
    return victim[1] - candidate[1] > parameters.margin_s


def is_worth_preempting(
    candidate: WaitingJob, victim: RunningJob, wait_s: float, parameters: DispatchParameters
) -> bool:
    """Say whether `candidate`, who would wait for `wait_s`, should have the place of `victim`."""
    if not (candidate.is_ranked and victim.is_ranked and victim.is_preemptible):
        return False
    if not is_far_behind(victim.key, candidate.key, parameters):
        return False
    cost_s = parameters.cost_weight * victim.preemption_s
    if wait_s <= parameters.margin_s + cost_s:
        return False
    if candidate.key[0] != victim.key[0]:
        return True
    if victim.key[1] - candidate.key[1] <= parameters.margin_s + cost_s:
        return False
    if victim.remaining_s is None or candidate.remaining_s is None:
        return True
    return (
        victim.remaining_s > parameters.protected_s
        and victim.remaining_s > candidate.remaining_s + cost_s
    )


def choose_victims(
    waiting: Iterable[WaitingJob],
    running: Sequence[RunningJob],
    room: Room,
    parameters: DispatchParameters,
) -> list[str]:
    """Return the ids of the running jobs to preempt, in the order to preempt them.

    `waiting` comes best first and is read only as far as needed; `running` comes worst first.
    Stops at the first waiting job for which no room can be made: nobody overtakes it by fitting.
    """
    victims: list[RunningJob] = []
    slots, blocks = room.slots, room.blocks
    for place, candidate in enumerate(waiting):
        left = Room(slots, blocks)
        chosen = _victims_for(candidate, running, victims, left, room.wait_s(place), parameters)
        if chosen is None:
            break
        victims.extend(chosen)
        slots += len(chosen) - 1
        blocks += sum(victim.blocks for victim in chosen) - candidate.blocks
    return [victim.job_id for victim in victims]


def _victims_for(
    candidate: WaitingJob,
    running: Sequence[RunningJob],
    taken: Sequence[RunningJob],
    room: Room,
    wait_s: float,
    parameters: DispatchParameters,
) -> list[RunningJob] | None:
    """Return whom to preempt so that `candidate` fits; empty if it does, None if it cannot."""
    chosen: list[RunningJob] = []
    slots, blocks = room.slots, room.blocks
    for victim in running:
        if slots >= 1 and blocks >= candidate.blocks:
            break
        if len(taken) + len(chosen) >= parameters.max_preemptions_per_step:
            break
        if victim not in taken and is_worth_preempting(candidate, victim, wait_s, parameters):
            chosen.append(victim)
            slots += 1
            blocks += victim.blocks
    return chosen if slots >= 1 and blocks >= candidate.blocks else None
