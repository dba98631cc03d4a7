"""The host tier's index: which slot holds which block of which job. Scheduler side.

Copies are private to their job: a lookup by another one misses, though it had the same tokens. A
copy is a prefix of its job's blocks and shrinks from its end only. Of a preempted job its *tail*
may be there, too: the last, unfilled block, which is of no use once the job runs again. It does not
decide whom to store or evict for (`decisions` does), nor copy anything (the worker does).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
)

from alise_engine.kv_tier.decisions import Holding, choose_evictions

_TAIL = b"tail-"


def tail_key(tokens: int) -> OffloadKey:
    """Return the key of the unfilled block that ends a context of so many tokens."""
    return OffloadKey(_TAIL + str(tokens).encode())


class HostSlots(LoadStoreSpec):  # type: ignore[misc]  # vLLM is untyped to us
    """Slots of the host tier, in the order of the job's blocks."""

    def __init__(self, slots: list[int], tail_tokens: int | None = None) -> None:
        self.slots = slots
        self.tail_tokens = tail_tokens
        """Tokens of the last block, where they don't fill it."""


@dataclass(slots=True)
class _Block:
    slot: int
    is_stored: bool = False
    readers: int = 0


@dataclass(slots=True)
class _JobCopy:
    """What the host holds of one job."""

    blocks: OrderedDict[OffloadKey, _Block] = field(default_factory=OrderedDict)
    tail_tokens: int | None = None
    """Tokens of context up to the end of the tail, if that is the last of `blocks`."""
    lost: str = "not_stored"
    """Why there is no more of it."""
    is_ended: bool = False

    def full_blocks(self) -> int:
        """Return how many leading blocks there are without the tail."""
        return len(self.blocks) - (self.tail_tokens is not None)

    def evictable(self) -> int:
        """Return how many blocks at the tail are neither being written nor being read."""
        count = 0
        for block in reversed(self.blocks.values()):
            if not block.is_stored or block.readers:
                break
            count += 1
        return count


class HostTierManager(OffloadingManager):  # type: ignore[misc]  # vLLM is untyped to us
    """Slots by job; never more than `slots` in use."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots - 1, -1, -1))
        self._copies: dict[str, _JobCopy] = {}  # req_id -> copy
        self.waiting_times: Callable[[str], Mapping[str, float]] = lambda _: {}
        """Asked when room is short: EWT in seconds by job id, with the job that needs room."""

    # What the tier asks.

    def used_slots(self) -> int:
        """Return how many slots hold a block or wait for one."""
        return self.slots - len(self._free)

    def blocks_of(self, job_id: str) -> int:
        """Return how many leading full blocks of a job are stored, or being stored."""
        copy = self._copies.get(job_id)
        return copy.full_blocks() if copy is not None else 0

    def tail_of(self, job_id: str) -> int | None:
        """Return the tokens of a job up to the end of its stored tail; None without one."""
        copy = self._copies.get(job_id)
        return copy.tail_tokens if copy is not None else None

    def why_incomplete(self, job_id: str) -> str:
        """Return why the host does not hold more of a job: the label of the metric of misses."""
        copy = self._copies.get(job_id)
        return copy.lost if copy is not None else "not_stored"

    def make_room(self, job_id: str, blocks: int, *, is_running: bool) -> int:
        """Free slots for `blocks` more of a job; return how many it may have.

        For a job that goes on running nobody is evicted: its copy may never be needed.
        """
        if len(self._free) < blocks and not is_running:
            times = self.waiting_times(job_id)
            holdings = [
                Holding(other, copy.evictable(), times.get(other, float("inf")))
                for other, copy in self._copies.items()
                if other != job_id and copy.blocks
            ]
            needed = blocks - len(self._free)
            for other, count in choose_evictions(holdings, needed, times.get(job_id, float("inf"))):
                self._drop_last(other, count, "evicted")
        return min(blocks, len(self._free))

    def drop_after(self, job_id: str, blocks: int, why: str) -> None:
        """Drop what the host holds of a job beyond its first `blocks` blocks."""
        copy = self._copies.get(job_id)
        if copy is not None:
            self._drop_last(job_id, max(len(copy.blocks) - blocks, 0), why)

    def drop_tail(self, job_id: str) -> None:
        """Drop a job's tail, as it runs again; one that is just being read goes after that."""
        copy = self._copies.get(job_id)
        if copy is not None and copy.tail_tokens is not None and copy.evictable():
            self._drop_last(job_id, 1, copy.lost)

    # What vLLM's connector asks.

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Say whether a block of this very job can be read."""
        copy = self._copies.get(req_context.req_id)
        block = copy.blocks.get(key) if copy is not None else None
        if block is None:
            return LookupResult.MISS
        return LookupResult.HIT if block.is_stored else LookupResult.HIT_PENDING

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> HostSlots:
        """Keep these blocks from being evicted until `complete_load`."""
        copy = self._copies[req_context.req_id]
        for key in keys:
            copy.blocks[key].readers += 1
        return HostSlots([copy.blocks[key].slot for key in keys])

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Let the blocks go again."""
        copy = self._copies.get(req_context.req_id)
        if copy is None:
            return
        for key in keys:
            if key in copy.blocks:
                copy.blocks[key].readers -= 1
        self.drop_tail(req_context.req_id)
        self._free_if_ended(req_context.req_id)

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """Reserve slots for these blocks; None without room for all of them."""
        copy = self._copies.setdefault(req_context.req_id, _JobCopy())
        new_keys = [key for key in keys if key not in copy.blocks]
        if len(new_keys) > len(self._free):
            return None
        slots = [self._free.pop() for _ in new_keys]
        for key, slot in zip(new_keys, slots, strict=True):
            assert copy.tail_tokens is None, "a tail is the last block"
            copy.blocks[key] = _Block(slot)
            if key.startswith(_TAIL):
                copy.tail_tokens = int(key.removeprefix(_TAIL))
        copy.lost = "not_stored"
        return PrepareStoreOutput(
            keys_to_store=new_keys, store_spec=HostSlots(slots), evicted_keys=[]
        )

    def complete_store(
        self,
        keys: Collection[OffloadKey],
        req_context: ReqContext,
        success: bool = True,  # noqa: ARG002 # a failed block fails its checksum when it is read
    ) -> None:
        """Make the blocks readable."""
        copy = self._copies.get(req_context.req_id)
        if copy is None:
            return
        for key in keys:
            if key in copy.blocks:
                copy.blocks[key].is_stored = True
        self._free_if_ended(req_context.req_id)

    def on_new_request(self, *_: ReqContext) -> RequestOffloadingContext:
        """Nothing is held of a new job."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Free the job's slots, at once or when the copies under way have ended."""
        copy = self._copies.get(req_context.req_id)
        if copy is not None:
            copy.is_ended = True
            self._free_if_ended(req_context.req_id)

    def reset_cache(self) -> None:
        """Forget everything. The connector waits for the copies under way."""
        self._copies.clear()
        self._free = list(range(self.slots - 1, -1, -1))

    # Slots back.

    def _free_if_ended(self, job_id: str) -> None:
        copy = self._copies[job_id]
        if copy.is_ended:
            self._drop_last(job_id, copy.evictable(), "ended")
            if not copy.blocks:
                del self._copies[job_id]

    def _drop_last(self, job_id: str, blocks: int, why: str) -> None:
        copy = self._copies[job_id]
        for _ in range(blocks):
            _, block = copy.blocks.popitem()
            copy.tail_tokens = None  # it was the last
            self._free.append(block.slot)
        if blocks:
            copy.lost = why
