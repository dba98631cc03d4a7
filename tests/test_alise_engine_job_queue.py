"""The keyed queue against a plain sorted list, under arbitrary operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from alise_engine.job_queue import KeyedRequestQueue
from hypothesis import given
from hypothesis import strategies as st

operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "pop", "remove", "reorder", "prepend"]),
        st.integers(0, 9),
        st.floats(-10, 10),
    ),
    max_size=60,
)


@given(operations)
def test_is_a_sorted_list_that_follows_its_keys(steps: list[tuple[str, int, float]]) -> None:
    keys = {f"{n}": (0, 0.0, n) for n in range(10)}
    jobs: dict[str, Any] = {job_id: SimpleNamespace(request_id=job_id) for job_id in keys}
    queue = KeyedRequestQueue(lambda request: keys[request.request_id])
    model: set[str] = set()
    for action, number, priority in steps:
        job_id = str(number)
        if action in ("add", "prepend") and job_id not in model:
            keys[job_id] = (0, priority, number)
            (queue.add_request if action == "add" else queue.prepend_request)(jobs[job_id])
            model.add(job_id)
        elif action == "pop" and model:
            first = min(model, key=lambda name: keys[name])
            assert queue.peek_request() is jobs[first]
            assert queue.pop_request() is jobs[first]
            model.remove(first)
        elif action == "remove":
            queue.remove_requests([jobs[job_id]])
            model.discard(job_id)
        elif action == "reorder":
            keys[job_id] = (0, priority, number)
            queue.reorder(jobs[job_id])
        expected = sorted(model, key=lambda name: keys[name])
        assert [request.request_id for request in queue] == expected
        assert len(queue) == len(model)
        assert bool(queue) == bool(model)


def test_empty_queue() -> None:
    queue = KeyedRequestQueue(lambda _: (0, 0.0, 0))
    with pytest.raises(IndexError, match="empty"):
        queue.pop_request()
    with pytest.raises(IndexError, match="empty"):
        queue.peek_request()
