"""What the KV tier stores, evicts, loads, and what a preemption costs.

Pure: numbers in, choices out. It knows jobs by id, KV in blocks, and nothing of vLLM, tensors
or where bytes lie.

Words: a *copy* is what the host holds of a job's KV, always a prefix of its blocks; the *estimated
waiting time* (EWT) of a job is the predicted work ahead of it at the present service rate.

Invariants (tests/test_alise_engine_kv_tier_decisions.py):

- a copy loses blocks from its tail only, so what is left stays loadable;
- nothing is evicted for a job that will need its own copy later than the one who would lose it;
- stores ahead of a preemption stay within their budget of time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

_REFUSALS_PER_HOPE = 8


@dataclass(frozen=True, slots=True)
class CopyCosts:
    """Measured seconds per token of context."""

    store_s_per_token: float
    load_s_per_token: float
    prefill_s_per_token: float


@dataclass(frozen=True, slots=True)
class Copy:
    """How much of a job's context the host holds, in tokens."""

    context_tokens: int
    """Tokens with KV on the device now."""
    stored_tokens: int
    """Of these, tokens that the host holds."""


@dataclass(frozen=True, slots=True)
class LikelyVictim:
    """A running job that may be preempted soon."""

    job_id: str
    remaining_s: float | None
    unstored_blocks: int
    """Full ones: the last block of a running job changes with every step."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one job holds in the host tier."""

    job_id: str
    evictable_blocks: int
    """At its tail; neither being written nor being read."""
    ewt_s: float
    """When its copy is needed; infinite while the job runs, as nothing is lost then."""


@dataclass(frozen=True, slots=True)
class TierParameters:
    """The tier's few constants, with their reasons."""

    store_share: float = 0.03
    """Share of a step's time that storing ahead may add to it."""
    min_remaining_s: float = 4.0
    """A job with less work left is an unlikely victim (dispatch's margin)."""
    likely_victims: int = 4
    """Stored ahead are so many of the worst running jobs: dispatch takes no more in one step."""
    lead_steps: float = 2.0
    """A load takes effect in the step after the one in which it was started."""


def swap_s(copy: Copy, costs: CopyCosts) -> float:
    """Return what moving a job out and in again costs: what is missing out, everything in."""
    store_s = max(copy.context_tokens - copy.stored_tokens, 0) * costs.store_s_per_token
    return store_s + copy.context_tokens * costs.load_s_per_token


def recompute_s(copy: Copy, costs: CopyCosts) -> float:
    """Return what running the whole context again costs."""
    return copy.context_tokens * costs.prefill_s_per_token


def preemption_s(copy: Copy, costs: CopyCosts) -> float:
    """Return what preempting this very job costs: swapping or recomputing, the cheaper one."""
    return min(swap_s(copy, costs), recompute_s(copy, costs))


def hopeful(costs: CopyCosts, refusals: int) -> CopyCosts:
    """Return the costs to choose by after so many preemptions at which copying seemed too slow.

    Only copies tell how fast copies are: the longer none was made, the faster they are taken to
    be. Copies that are `k` times too slow are tried once in about `8 (k - 1)` preemptions.
    """
    hope = 1 + refusals / _REFUSALS_PER_HOPE
    return replace(
        costs,
        store_s_per_token=costs.store_s_per_token / hope,
        load_s_per_token=costs.load_s_per_token / hope,
    )


def is_prefetch_due(ewt_s: float, load_s: float, step_s: float, parameters: TierParameters) -> bool:
    """Say whether a copy must start back now to be there when its job's turn comes."""
    return ewt_s <= load_s + parameters.lead_steps * step_s


def store_budget_blocks(step_s: float, block_store_s: float, parameters: TierParameters) -> float:
    """Return how many blocks may be stored ahead in a step of `step_s` seconds."""
    return parameters.store_share * step_s / block_store_s


def choose_stores(
    running: Iterable[LikelyVictim], budget_blocks: int, parameters: TierParameters
) -> list[tuple[str, int]]:
    """Return (job id, blocks) to store ahead; `running` comes worst first.

    The worst job comes first as it is preempted first; its copy is completed before the next.
    """
    chosen: list[tuple[str, int]] = []
    considered = 0
    for victim in running:
        if budget_blocks <= 0 or considered >= parameters.likely_victims:
            break
        if victim.remaining_s is not None and victim.remaining_s < parameters.min_remaining_s:
            continue
        considered += 1
        blocks = min(victim.unstored_blocks, budget_blocks)
        if blocks > 0:
            chosen.append((victim.job_id, blocks))
            budget_blocks -= blocks
    return chosen


def choose_evictions(
    holdings: Iterable[Holding], needed_blocks: int, ewt_s: float
) -> list[tuple[str, int]]:
    """Return (job id, blocks to drop from its tail) to make room for a job with this EWT.

    Longest EWT first; running jobs' copies (infinite EWT) go before all others. Frees as much as
    it may, which can be less than `needed_blocks`: who needs its copy sooner keeps it.
    """
    chosen: list[tuple[str, int]] = []
    for holding in sorted(holdings, key=lambda h: (-h.ewt_s, h.job_id)):
        if needed_blocks <= 0 or holding.ewt_s <= ewt_s:
            break
        blocks = min(holding.evictable_blocks, needed_blocks)
        if blocks > 0:
            chosen.append((holding.job_id, blocks))
            needed_blocks -= blocks
    return chosen
