"""vLLM's waiting queue, ordered by keys that may change while a job waits.

It does not know what the keys mean. A heap (vLLM's own priority queue) breaks when a key changes
under it; here the key that a job was filed under is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sortedcontainers import SortedDict
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from alise_engine.dispatch import OrderKey


class KeyedRequestQueue(RequestQueue):  # type: ignore[misc]  # vLLM is untyped to us
    """A request queue in ascending order of `key_of(request)`; O(log n) for each operation.

    Keys are unique (they end in an arrival number). "Prepending" files a request under its key
    like any other: a preempted job goes where its priority puts it.
    """

    def __init__(self, key_of: Callable[[Request], OrderKey]) -> None:
        self._key_of = key_of
        self._requests = SortedDict()  # key -> Request
        self._keys: dict[str, OrderKey] = {}  # req_id -> key that it is filed under

    def add_request(self, request: Request) -> None:
        """File `request` under its key."""
        key = self._key_of(request)
        self._keys[request.request_id] = key
        self._requests[key] = request

    def pop_request(self) -> Request:
        """Remove and return the first request; IndexError when empty."""
        if not self._requests:
            raise IndexError("pop from an empty queue")
        _, request = self._requests.popitem(0)
        del self._keys[request.request_id]
        return request

    def peek_request(self) -> Request:
        """Return the first request; IndexError when empty."""
        if not self._requests:
            raise IndexError("peek from an empty queue")
        return self._requests.peekitem(0)[1]

    def prepend_request(self, request: Request) -> None:
        """File `request` under its key."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """File each of `requests` under its key."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Remove `request`; nothing happens when it is not here."""
        key = self._keys.pop(request.request_id, None)
        if key is not None:
            del self._requests[key]

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove those of `requests` that are here."""
        for request in requests:
            self.remove_request(request)

    def reorder(self, request: Request) -> None:
        """File `request` anew after its key changed; nothing happens when it is not here."""
        old_key = self._keys.get(request.request_id)
        if old_key is not None and old_key != self._key_of(request):
            self.remove_request(request)
            self.add_request(request)

    def __bool__(self) -> bool:
        return bool(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())
