"""Preemption with the KV tier and the pod's memory at their limits: no kill for memory."""

from __future__ import annotations

import json

import pytest
from cluster import (
    chat,
    failed,
    in_pod,
    metric,
    patch,
    pods,
    restarts,
    uids,
    wait_replaced,
)

# Blocks for about three of the answers below, and a tier for less than one more (12 blocks of
# 380 kB, 8 of them for copies under way): both are full in seconds.
_TIER_GIB = 0.0045
_PRESSED = [
    *("--block-size", "32", "--num-gpu-blocks-override", "20", "--max-num-seqs", "6"),
    *("--max-model-len", "512", "--alise-kv-host-gib", str(_TIER_GIB)),
]
# /dev/shm, which counts towards the container's limit, but for what vLLM's queues need of it.
_FILL_SHM = """
import os
with open("/dev/shm/fill", "wb") as file:
    size = os.statvfs("/dev/shm")
    for _ in range((size.f_bavail * size.f_frsize >> 20) - 256):
        file.write(bytes(1 << 20))
print(file.name)
"""
# Kills for memory and the peak, from either version of control groups.
_MEMORY = """
import pathlib
root = pathlib.Path("/sys/fs/cgroup")
events = root / "memory.events" if (root / "memory.events").exists() else \\
    root / "memory" / "memory.oom_control"
print(dict(line.split() for line in events.read_text().splitlines())["oom_kill"])
peak = [root / "memory.peak", root / "memory" / "memory.max_usage_in_bytes"]
print(*[path.read_text() for path in peak if path.exists()])
"""


@pytest.mark.timeout(1200)
def test_nothing_is_killed_for_memory(smol: str) -> None:
    before = uids(smol)
    # With less memory of its own than the example gives.
    small = {"memoryGiB": 2}
    patch(smol, engine={"args": _PRESSED, "resources": small})
    try:
        wait_replaced(smol, before)
        (pod,) = pods(smol)
        name = pod["metadata"]["name"]
        in_pod(name, "engine", _FILL_SHM)
        prompts = [[f"Tell a long story about number {number}.", 150] for number in range(12)]
        assert failed(chat(smol, "--burst", json.dumps(prompts), wait_s=600)) == []
        assert metric(pod, "vllm:num_preemptions_total", 8000) > 0
        assert metric(pod, "alise_kv_tier_restored_tokens_total", 8000) > 0
        # It was full: not all of what was preempted could be kept.
        hits = metric(pod, 'alise_kv_tier_lookups_total{result="hit"}', 8000)
        assert metric(pod, "alise_kv_tier_lookups_total", 8000) > hits
        assert metric(pod, "alise_kv_tier_held_bytes", 8000) <= _TIER_GIB * 2**30
        kills, peak_bytes = map(int, in_pod(name, "engine", _MEMORY).split())
        print(f"\npeak {peak_bytes / 2**30:.1f} GiB")
        assert kills == 0
        assert restarts(smol, "engine") == 0
        assert uids(smol) == {pod["metadata"]["uid"]}
    finally:
        before = uids(smol)
        patch(smol, engine={"args": None, "resources": {"memoryGiB": 4}})
        wait_replaced(smol, before)
