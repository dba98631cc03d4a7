"""To zero and back, by `kubectl scale`."""

from __future__ import annotations

from cluster import chat, condition, eventually, kubectl, pods, status, wait_ready


def test_to_zero_and_back(smol: str) -> None:
    kubectl("scale", "alise", smol, "--replicas=0")
    eventually(lambda: not pods(smol), "no pod is left", 120)
    eventually(lambda: status(smol)["replicas"] == 0, "status says 0", 30)
    assert condition(smol) != ("True", "AllReplicasReady")
    kubectl("scale", "alise", smol, "--replicas=1")
    eventually(lambda: len(pods(smol)) == 1, "a pod is made", 30)
    wait_ready(smol)
    (answer,) = chat(smol)
    assert "error" not in answer
