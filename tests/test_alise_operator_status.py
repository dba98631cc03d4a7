"""From pods and workloads to conditions, the last failure and events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from alise_operator.api.crd import root_schema
from alise_operator.manifests.kinds import LWS, SCALED_OBJECT
from alise_operator.status.failures import failures_of
from alise_operator.status.observation import Observation, WorkloadState, workload_state
from alise_operator.status.status import announcements, invalid_status, service_status
from operator_fixtures import LOADING, ROOT, RUNNING, pod, view, waiting

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T00:05:00Z"
DOWN = WorkloadState(replicas=1, ready=0, updated=1, is_current=True)
UP = WorkloadState(replicas=1, ready=1, updated=1, is_current=True)


def status(
    seen: Observation, previous: Any = None, now: str = NOW, **fields: Any
) -> dict[str, Any]:
    return service_status(view(**fields), seen, previous or {}, now)


def verdict(found: dict[str, Any], name: str) -> tuple[str, str]:
    (condition,) = [item for item in found["conditions"] if item["type"] == name]
    return condition["status"], condition["reason"]


def message(found: dict[str, Any], name: str) -> str:
    (condition,) = [item for item in found["conditions"] if item["type"] == name]
    return condition["message"]


def ended(code: int, text: str = "", reason: str = "Error") -> dict[str, Any]:
    """Return a container that restarts after an end."""
    last = {"reason": reason, "exitCode": code, "message": text, "finishedAt": NOW}
    return {"state": {"running": {}}, "ready": False, "lastState": {"terminated": last}}


PULL = "Back-off pulling image: not found"
NO_GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("broken", "reason", "text"),
    [
        (pod(engine=waiting("ImagePullBackOff", PULL), predictor=RUNNING), "ImagePullFailed", PULL),
        (
            pod(conditions=[{"type": "PodScheduled", "status": "False", "message": NO_GPU}]),
            "Unschedulable",
            NO_GPU,
        ),
        (pod(engine=ended(137, "x", "OOMKilled")), "OutOfMemory", "raise resources.memoryGiB"),
        (pod(engine=ended(1, "a\nKeyError: 'b'\n")), "Crashed", "KeyError: 'b'"),
        (
            pod(engine=ended(1, "huggingface_hub.errors.GatedRepoError: 403\nbye")),
            "ModelDownloadFailed",
            "GatedRepoError: 403",
        ),
        (
            pod(engine=ended(1, "Invalid repository ID or local directory specified: 'a/b'.\n1.")),
            "ModelDownloadFailed",
            "'a/b'",
        ),
        (
            pod(engine=ended(1, "torch.OutOfMemoryError: CUDA out of memory.")),
            "AcceleratorOutOfMemory",
            "CUDA out of memory",
        ),
        (pod(engine=ended(0, "", "Completed")), "ProbeFailed", "startup or liveness probe"),
        (pod(engine=ended(137)), "ProbeFailed", "killed from outside"),
        (pod(engine=ended(3)), "Crashed", "exit status 3 and wrote nothing"),
        (
            pod(engine=waiting("CreateContainerConfigError", 'secret "hub" not found')),
            "ContainerConfigError",
            'secret "hub" not found',
        ),
        (pod(phase="Failed", reason="Evicted", message="low on disk"), "Evicted", "low on disk"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failures_have_reasons_from_pods(broken: Any, reason: str, text: str) -> None:
    found = status(Observation(1, DOWN, (broken,)))
    for name, expected in (("Ready", "False"), ("EngineReady", "False"), ("Degraded", "True")):
        assert verdict(found, name) == (expected, reason)
    assert verdict(found, "Progressing") == ("False", "Stalled")
    assert text in message(found, "Degraded")
    assert found["lastFailure"]["reason"] == reason
    assert text in found["lastFailure"]["message"]


MONDAY, TUESDAY, WEDNESDAY = (f"2025-12-{day}T12:00:00Z" for day in (29, 30, 31))
# As the kubelet leaves one: what its containers were doing is told no more.
EVICTED = pod(
    "qwen-0",
    phase="Failed",
    reason="Evicted",
    message="low on disk",
    created=MONDAY,
    conditions=[{"type": "Ready", "status": "False", "lastTransitionTime": TUESDAY}],
)


@pytest.mark.parametrize(
    ("later", "ready", "degraded"),
    [
        (pod(engine=RUNNING, predictor=RUNNING, ready=True, created=TUESDAY), True, None),
        (pod(engine=LOADING, predictor=RUNNING, created=TUESDAY), False, None),
        (pod(engine=ended(1, "oops"), predictor=RUNNING, created=TUESDAY), False, "oops"),
        (
            pod(
                conditions=[{"type": "PodScheduled", "status": "False", "message": NO_GPU}],
                created=TUESDAY,
            ),
            False,
            NO_GPU,
        ),
        (pod(created=TUESDAY), False, "low on disk"),
        (
            pod(engine=RUNNING, predictor=RUNNING, created="2025-12-28T00:00:00Z"),
            True,
            "low on disk",
        ),
    ],
    ids=["serves", "loads", "crashes", "unschedulable", "only-just-made", "older"],
)
def test_a_failed_pod_counts_until_it_is_replaced(
    later: Any, ready: bool, degraded: str | None
) -> None:
    found = status(Observation(1, UP if ready else DOWN, (EVICTED, later)))
    assert verdict(found, "Degraded")[0] == str(degraded is not None)
    if degraded is None:
        assert verdict(found, "EngineReady")[0] == str(ready)
        assert verdict(found, "PredictorReady") == ("True", "PredictorsRun")
        assert verdict(found, "Progressing")[1] == ("Stable" if ready else "RollingOut")
    else:
        assert degraded in message(found, "Degraded")
        assert ("low on disk" in message(found, "Degraded")) == (degraded == "low on disk")
    assert found["lastFailure"]["time"] >= TUESDAY


def test_the_last_failure_is_the_latest_although_its_pod_is_gone() -> None:
    good = pod(engine=RUNNING, predictor=RUNNING, ready=True, created=TUESDAY)
    first = status(Observation(1, UP, (EVICTED, good)))
    assert (first["lastFailure"]["reason"], first["lastFailure"]["time"]) == ("Evicted", TUESDAY)
    crash = {"reason": "Error", "exitCode": 1, "message": "oops", "finishedAt": WEDNESDAY}
    bad = pod(engine={**LOADING, "lastState": {"terminated": crash}}, created=TUESDAY)
    second = status(Observation(1, DOWN, (EVICTED, bad)), first)
    assert second["lastFailure"]["message"] == "oops"
    new = pod("qwen-2", engine=RUNNING, predictor=RUNNING, ready=True, created=NOW)
    third = status(Observation(2, UP, (EVICTED, new)), second)
    assert third["lastFailure"] == second["lastFailure"]


def test_a_failure_that_goes_on_has_the_time_at_which_it_was_first_seen() -> None:
    stuck = Observation(1, DOWN, (EVICTED, pod(engine=waiting("ErrImagePull", "no such tag"))))
    first = status(stuck)
    assert first["lastFailure"] | {"message": ""} == {
        "pod": "qwen-1",
        "container": "engine",
        "reason": "ImagePullFailed",
        "message": "",
        "time": NOW,
    }
    assert status(stuck, first, LATER) == first


@pytest.mark.parametrize(
    ("starting", "reason"),
    [
        (pod(engine=LOADING, predictor=RUNNING), "ModelLoading"),
        (pod(engine=waiting("PodInitializing")), "PodStarting"),
        (pod(engine={"state": {"running": {}}, "started": True, "ready": False}), "ProbeFailed"),
    ],
    ids=["loading", "starting", "unready"],
)
def test_a_start_is_no_failure(starting: Any, reason: str) -> None:
    found = status(Observation(1, DOWN, (starting,)))
    assert verdict(found, "Ready") == ("False", reason)
    assert verdict(found, "Degraded") == ("False", "AsExpected")
    assert verdict(found, "Progressing") == ("True", "RollingOut")
    assert "lastFailure" not in found


def test_all_is_well() -> None:
    good = pod(engine=RUNNING, predictor=RUNNING, ready=True)
    found = status(Observation(7, UP, (good,)))
    assert {item["type"]: item["status"] for item in found["conditions"]} == {
        "Ready": "True",
        "SpecValid": "True",
        "EngineReady": "True",
        "PredictorReady": "True",
        "Progressing": "False",
        "Degraded": "False",
        "IntegrationsReady": "True",
    }
    assert found["observedGeneration"] == 7
    assert found["selector"] == "serving.alise.dev/service=qwen"
    fields = root_schema()["properties"]["status"]["properties"]
    assert found.keys() <= fields.keys()


def test_a_predictor_whose_container_runs_is_not_said_to_answer() -> None:
    good = pod(engine=RUNNING, predictor=RUNNING, ready=True)
    told = message(status(Observation(1, UP, (good,))), "PredictorReady")
    assert "whether it answers is told by the engine's metric" in told
    metrics = (ROOT / "docs" / "metrics.md").read_text()
    assert f"`{told.rsplit(' ', 1)[1]}`" in metrics


def test_a_dead_predictor_degrades_and_does_not_stop_the_service() -> None:
    crashed = waiting("CrashLoopBackOff", reason="Error", exitCode=1, message="boom")
    half = pod(engine=RUNNING, predictor=crashed, ready=True)
    found = status(Observation(1, UP, (half,)))
    assert verdict(found, "Ready") == ("True", "AllReplicasReady")
    assert verdict(found, "EngineReady") == ("True", "EnginesServe")
    assert verdict(found, "PredictorReady") == ("False", "Crashed")
    assert verdict(found, "Degraded") == ("True", "Crashed")
    assert "order of arrival" in message(found, "PredictorReady")


def test_a_finished_init_container_is_no_failure() -> None:
    done = {"reason": "Completed", "exitCode": 0}
    seed = {"name": "predictor-seed", "state": {"terminated": done}, "ready": True}
    found = pod(engine=RUNNING, ready=True)
    assert not failures_of(found)
    assert not failures_of(pod(engine=RUNNING, initContainerStatuses=[seed]))


def test_a_pod_that_is_asked_to_end_has_not_failed() -> None:
    body = pod(engine=ended(0, "", "Completed"))
    assert failures_of(body)
    assert not failures_of(replace(body, is_ending=True))


def test_one_bad_replica_of_two_is_not_ready() -> None:
    good = pod("a", engine=RUNNING, predictor=RUNNING, ready=True)
    bad = pod("b", engine=ended(1, "oops"), predictor=RUNNING)
    work = WorkloadState(replicas=2, ready=1, updated=2, is_current=True)
    found = status(Observation(1, work, (good, bad)), replicas=2)
    assert verdict(found, "Ready") == ("False", "Crashed")
    assert message(found, "Ready").startswith("1 of 2 replicas serve")


def test_an_outdated_workload_is_not_believed() -> None:
    good = pod(engine=RUNNING, predictor=RUNNING, ready=True)
    stale = WorkloadState(replicas=1, ready=1, updated=1, is_current=False)
    assert verdict(status(Observation(2, stale, (good,))), "Ready")[0] == "False"


@pytest.mark.parametrize(
    ("seen", "fields", "ready", "degraded"),
    [
        (Observation(1, WorkloadState(is_current=True)), {"replicas": 0}, "ScaledToZero", None),
        (Observation(1, DOWN, missing=(LWS,)), {}, "LeaderWorkerSetMissing", "install Leader"),
        (Observation(1, DOWN, missing=(SCALED_OBJECT,)), {}, "PodsPending", None),
        (Observation(1, DOWN, refused=("Service: no",)), {}, "Refused", "Service: no"),
        (
            Observation(1, WorkloadState(refusal="exceeded quota", is_current=True)),
            {},
            "PodsRefused",
            "exceeded quota",
        ),
        (
            Observation(1, WorkloadState(is_stuck=True, is_current=True)),
            {},
            "PodsPending",
            "startupTimeoutSeconds",
        ),
    ],
    ids=["zero", "lws", "keda", "refused", "quota", "stuck"],
)
def test_why_there_are_no_pods(
    seen: Observation, fields: Any, ready: str, degraded: str | None
) -> None:
    found = status(seen, **fields)
    assert verdict(found, "Ready") == ("False", ready)
    assert (verdict(found, "Degraded")[0] == "True") == (degraded is not None)
    assert (degraded or "") in message(found, "Degraded")


def test_times_change_only_when_a_condition_flips() -> None:
    starting = Observation(1, DOWN, (pod(engine=LOADING),))
    first = status(starting)
    assert status(starting, first, LATER) == first
    crashed = status(Observation(1, DOWN, (pod(engine=ended(1, "x")),)), first, LATER)
    times = {item["type"]: item["lastTransitionTime"] for item in crashed["conditions"]}
    assert times["Ready"] == NOW  # false before and after, for another reason
    assert times["Degraded"] == LATER


def test_events_tell_of_transitions_only() -> None:
    starting = status(Observation(1, DOWN, (pod(engine=LOADING),)))
    broken = status(Observation(1, DOWN, (pod(engine=ended(1, "oops")),)), starting)
    good = pod(engine=RUNNING, predictor=RUNNING, ready=True)
    healthy = status(Observation(1, UP, (good,)), broken)
    assert announcements(starting, starting) == []
    assert [(a.type, a.reason) for a in announcements(starting, broken)] == [("Warning", "Crashed")]
    assert [(a.type, a.reason) for a in announcements(broken, healthy)] == [
        ("Normal", "Ready"),
        ("Normal", "Recovered"),
    ]


def test_with_an_invalid_spec_nobody_knows_whether_enough_replicas_serve() -> None:
    good = pod(engine=RUNNING, predictor=RUNNING, ready=True)
    before = status(Observation(1, UP, (good,)))
    after = invalid_status("spec.replicas: no", Observation(2, UP, (good,)), before, LATER)
    assert verdict(after, "SpecValid") == ("False", "InvalidSpec")
    assert verdict(after, "Degraded") == ("True", "InvalidSpec")
    assert verdict(after, "Ready") == ("Unknown", "InvalidSpec")
    assert message(after, "Ready").startswith("1 replicas serve")
    assert verdict(after, "PredictorReady") == ("True", "PredictorsRun")
    assert after["resolvedImages"] == before["resolvedImages"]
    assert [(a.type, a.reason) for a in announcements(before, after)] == [
        ("Warning", "InvalidSpec")
    ]
    # What happens to the pods meanwhile is still told.
    bad = pod(engine=ended(1, "oops"), predictor=RUNNING)
    crashed = invalid_status("spec.replicas: no", Observation(2, DOWN, (bad,)), after, LATER)
    assert (crashed["readyReplicas"], crashed["lastFailure"]["message"]) == (0, "oops")


def test_an_engine_that_is_ending_no_longer_counts() -> None:
    good = pod(engine=RUNNING, predictor=RUNNING, ready=True)
    assert verdict(status(Observation(1, UP, (good,))), "EngineReady")[0] == "True"
    ending = replace(good, is_ending=True)
    assert verdict(status(Observation(1, DOWN, (ending,))), "EngineReady")[0] == "False"


def test_images_that_a_paused_service_does_not_run_yet_are_not_claimed() -> None:
    before = status(Observation(1, UP))
    paused = status(Observation(2, UP), before, paused=True, engine={"image": "engine:2"})
    assert paused["resolvedImages"] == before["resolvedImages"]
    assert "resolvedImages" not in status(Observation(1, DOWN), paused=True)


def test_what_a_deployment_says() -> None:
    body = {
        "metadata": {"generation": 3},
        "status": {
            "observedGeneration": 3,
            "replicas": 2,
            "readyReplicas": 1,
            "updatedReplicas": 2,
            "conditions": [
                {"type": "ReplicaFailure", "status": "True", "message": "quota"},
                {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"},
            ],
        },
    }
    assert workload_state(body) == WorkloadState(2, 1, 2, True, "quota", True)
    assert workload_state(None) == WorkloadState()
    assert not workload_state({"metadata": {"generation": 1}}).is_current
    older_group = {"metadata": {"generation": 2}, "status": {"replicas": 1, "readyReplicas": 1}}
    assert workload_state(older_group).is_current
