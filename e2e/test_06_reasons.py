"""What can't work says why, in status and events, within half a minute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import NAMESPACE, apply, condition, eventually, kubectl, objects, pods, status

_WITHIN_S = 30
_CHILDREN = (
    "deployments,pods,services,serviceaccounts,configmaps,persistentvolumeclaims,"
    "networkpolicies,poddisruptionbudgets"
)
_SMALL = {
    "resources": {"cpu": "10m", "memoryGiB": 1},
    "shmGiB": 1,
    "accelerator": {"count": 0},
}


@pytest.fixture
def broken(operator: None) -> Iterator[Any]:
    """Make services; they are deleted afterwards."""
    made = []

    def make(name: str, engine: dict[str, Any], **spec: Any) -> str:
        metadata = {"name": name, "namespace": NAMESPACE}
        body = {
            "apiVersion": "serving.alise.dev/v1alpha1",
            "kind": "ALISEService",
            "metadata": metadata,
            "spec": {
                "model": {"uri": "embedded://smollm2-135m-instruct"},
                "kvSwap": {"enabled": False},
                "predictor": {"resources": {"cpu": "10m", "memoryGiB": 1}},
                "engine": {**_SMALL, **engine},
                **spec,
            },
        }
        apply(body)
        made.append(name)
        return name

    yield make
    for name in made:
        kubectl("delete", "alise", name)
        selector = f"serving.alise.dev/service={name}"
        of_it = ("get", _CHILDREN, "-l", selector, "-o", "name")
        eventually(lambda of_it=of_it: not kubectl(*of_it), f"nothing is left of {name}", 90)


def test_more_gpus_than_there_are(broken: Any) -> None:
    name = broken("too-many", {"accelerator": {"count": 64}, "parallelism": {"tensor": 64}})
    wanted = ("False", "Unschedulable")
    eventually(lambda: condition(name) == wanted, str(wanted), _WITHIN_S)
    assert "Insufficient nvidia.com/gpu" in json.dumps(status(name))
    event_of(name, "Unschedulable")


def test_an_image_that_does_not_exist(broken: Any) -> None:
    name = broken("no-image", {"image": "localhost/no-such-image:1"})
    wanted = ("False", "ImagePullFailed")
    eventually(lambda: condition(name) == wanted, str(wanted), _WITHIN_S)
    assert "no-such-image" in json.dumps(status(name))
    event_of(name, "ImagePullFailed")


def test_a_token_that_does_not_exist(broken: Any) -> None:
    token = {"tokenSecretRef": {"name": "no-such-secret", "key": "token"}}
    name = broken(
        "no-token", {}, model={"uri": "hf://org/model", "cache": {"enabled": False}, **token}
    )
    eventually(
        lambda: "no-such-secret" in json.dumps(status(name)), "the Secret is named", _WITHIN_S
    )
    assert condition(name)[0] == "False"


def test_a_volume_with_a_model_that_does_not_exist(broken: Any) -> None:
    name = broken("no-claim", {}, model={"uri": "pvc://no-such-claim/model"})
    wanted = ("False", "Unschedulable")
    eventually(lambda: condition(name) == wanted, str(wanted), _WITHIN_S)
    assert "no-such-claim" in json.dumps(status(name))
    event_of(name, "Unschedulable")


@pytest.mark.timeout(600)
def test_a_model_that_does_not_exist(broken: Any) -> None:
    """Within half a minute of the engine's own end: it must start to find out."""
    enough = {"resources": {"cpu": "10m", "memoryGiB": 3}}
    name = broken(
        "no-model",
        {**enough, "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]},
        model={"uri": "hf://no-such-org/no-such-model", "cache": {"enabled": False}},
    )

    def has_ended() -> bool:
        states = [
            state
            for pod in pods(name)
            for each in pod["status"].get("containerStatuses", [])
            for state in (each["state"], each["lastState"])
        ]
        return any("terminated" in state for state in states)

    eventually(has_ended, "the engine ends")
    wanted = ("False", "ModelDownloadFailed")
    eventually(lambda: condition(name) == wanted, str(wanted), _WITHIN_S)
    assert "LocalEntryNotFoundError" in json.dumps(status(name))
    event_of(name, "ModelDownloadFailed")


def event_of(service: str, reason: str) -> None:
    """Wait until an event tells of `reason`."""

    def told() -> bool:
        selector = (
            f"--field-selector=involvedObject.kind=ALISEService,involvedObject.name={service}"
        )
        return any(event["reason"] == reason for event in objects("events", selector)["items"])

    eventually(told, f"an event {reason}", _WITHIN_S)
