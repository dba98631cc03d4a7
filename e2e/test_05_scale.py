"""To zero and back, by `kubectl scale`; up, by Kubernetes' own autoscaler."""

from __future__ import annotations

from cluster import chat, condition, eventually, kubectl, objects, patch, pods, status, wait_ready


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


def test_the_autoscaler_scales_it(smol: str) -> None:
    # No metrics are served here: what it can do without them is to keep to the bounds.
    patch(smol, autoscaling={"minReplicas": 2, "maxReplicas": 2})
    try:
        eventually(lambda: objects("alise", smol)["spec"]["replicas"] == 2, "it is scaled", 90)
        eventually(lambda: len(pods(smol)) == 2, "a second pod is made", 30)
        found = {
            each["type"]: each["status"] for each in objects("hpa", smol)["status"]["conditions"]
        }
        assert found["AbleToScale"] == "True"
    finally:
        patch(smol, autoscaling=None)
    eventually(lambda: "hpa" not in kubectl("get", "hpa", "-o", "name"), "it is gone", 30)
    kubectl("scale", "alise", smol, "--replicas=1")
    eventually(lambda: len(pods(smol)) == 1, "one pod is left", 90)
    wait_ready(smol)
