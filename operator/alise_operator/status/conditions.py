"""The conditions: each a function of what was seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from alise_operator.api.service import ALISEServiceSpec
from alise_operator.manifests.engine import ENGINE
from alise_operator.manifests.kinds import LWS
from alise_operator.manifests.predictor import PREDICTOR
from alise_operator.status.failures import Failure, failures_of
from alise_operator.status.observation import Observation
from alise_operator.status.pods import present_pods

SCALED_TO_ZERO: Final = "ScaledToZero"
_MAX_MESSAGE: Final = 2048
_NOT_SEEN_FROM_OUTSIDE: Final = (
    "their containers run; one that crashes is started again inside of its container, so whether "
    "it answers is told by the engine's metric alise_engine_sidecar_connected"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition, without its time."""

    type: str
    status: str
    reason: str
    message: str = ""


def _verdict(name: str, holds: bool | None, reason: str, message: str = "") -> Verdict:
    status = "Unknown" if holds is None else str(holds)
    return Verdict(name, status, reason, message[:_MAX_MESSAGE])


def invalid_spec(message: str, seen: Observation) -> tuple[Verdict, ...]:
    """Return the verdicts on a spec that cannot be read; pods that run are left alone.

    How many replicas should serve is unknown then, so whether all do is as well.
    """
    seen = replace(seen, pods=present_pods(seen.pods))
    failures = [failure for pod in seen.pods for failure in failures_of(pod)]
    predictor = [failure for failure in failures if failure.container == PREDICTOR]
    ready = f"{seen.workload.ready} replicas serve, as an earlier spec asked for"
    return (
        _verdict("Ready", None, "InvalidSpec", ready),
        _verdict("SpecValid", False, "InvalidSpec", message),
        _verdict("EngineReady", None, "InvalidSpec", ready),
        _predictor_ready(seen, predictor),
        _verdict("Progressing", False, "InvalidSpec", "nothing is changed until the spec is valid"),
        _verdict("Degraded", True, "InvalidSpec", message),
    )


def conditions(spec: ALISEServiceSpec, seen: Observation) -> tuple[Verdict, ...]:
    """Return all verdicts on a valid spec."""
    seen = replace(seen, pods=present_pods(seen.pods))
    failures = [failure for pod in seen.pods for failure in failures_of(pod)]
    engine = [failure for failure in failures if failure.container != PREDICTOR]
    predictor = [failure for failure in failures if failure.container == PREDICTOR]
    return (
        _ready(spec, seen, engine or predictor),
        _verdict("SpecValid", True, "Valid"),
        _engine_ready(spec, seen, engine),
        _predictor_ready(seen, predictor),
        _progressing(spec, seen, engine),
        _degraded(seen, failures),
        _integrations(seen),
    )


def _ready(spec: ALISEServiceSpec, seen: Observation, failures: list[Failure]) -> Verdict:
    work = seen.workload
    ready = f"{work.ready} of {spec.replicas} replicas serve"
    if spec.replicas == 0:
        return _verdict("Ready", False, SCALED_TO_ZERO, "spec.replicas is 0: nothing serves")
    if work.is_current and work.ready >= spec.replicas:
        return _verdict("Ready", True, "AllReplicasReady", ready)
    reason, message = _why_not(seen, failures)
    return _verdict("Ready", False, reason, f"{ready}; {message}" if message else ready)


def _why_not(seen: Observation, failures: list[Failure]) -> tuple[str, str]:
    if LWS in seen.missing:
        return "LeaderWorkerSetMissing", _install(LWS.product)
    if failures:
        worst = failures[0]
        return worst.reason, _about(worst)
    if seen.workload.refusal:
        return "PodsRefused", seen.workload.refusal
    if seen.refused:
        return "Refused", seen.refused[0]
    pods = [pod for pod in seen.pods if not pod.is_ending and not pod.is_ready]
    for pod in pods:
        engine = pod.container(ENGINE)
        if engine is None or not engine.is_running:
            continue
        if not engine.has_started:
            return "ModelLoading", f"the engine of pod {pod.name} downloads or loads the model"
        return "ProbeFailed", f"the engine of pod {pod.name} runs but does not answer /health"
    if pods:
        return "PodStarting", f"pod {pods[0].name} is being started"
    return "PodsPending", "pods are being created"


def _engine_ready(spec: ALISEServiceSpec, seen: Observation, failures: list[Failure]) -> Verdict:
    ready = [
        pod
        for pod in seen.pods
        if not pod.is_ending and (engine := pod.container(ENGINE)) is not None and engine.is_ready
    ]
    if spec.replicas and len(ready) >= spec.replicas and not failures:
        return _verdict("EngineReady", True, "EnginesServe")
    if spec.replicas == 0:
        return _verdict("EngineReady", False, SCALED_TO_ZERO)
    reason, message = _why_not(seen, failures)
    return _verdict("EngineReady", False, reason, message)


def _predictor_ready(seen: Observation, failures: list[Failure]) -> Verdict:
    if failures:
        text = f"{_about(failures[0])}; the engine goes on in order of arrival"
        return _verdict("PredictorReady", False, failures[0].reason, text)
    found = [
        state
        for pod in seen.pods
        if not pod.is_ending and (state := pod.container(PREDICTOR)) is not None
    ]
    if not found:
        return _verdict("PredictorReady", None, "NoPods", "no pod has started a predictor yet")
    if all(state.is_running for state in found):
        return _verdict("PredictorReady", True, "PredictorsRun", _NOT_SEEN_FROM_OUTSIDE)
    return _verdict("PredictorReady", False, "PredictorStarting", "a predictor is being started")


def _progressing(spec: ALISEServiceSpec, seen: Observation, failures: list[Failure]) -> Verdict:
    work = seen.workload
    decide = partial(_verdict, "Progressing")
    if spec.paused:
        return decide(False, "Paused", "spec.paused is true: nothing is changed or repaired")
    if LWS in seen.missing or seen.refused:
        return decide(False, "Blocked", "see the condition Degraded")
    is_done = (
        work.is_current
        and work.updated >= spec.replicas
        and work.replicas == spec.replicas
        and work.ready >= spec.replicas
    )
    if is_done:
        return decide(False, "Stable")
    if work.is_stuck or failures:
        return decide(False, "Stalled", "see the condition Degraded")
    text = f"{work.updated} of {spec.replicas} replicas have the present spec, {work.ready} serve"
    return decide(True, "RollingOut", text)


def _degraded(seen: Observation, failures: list[Failure]) -> Verdict:
    if seen.refused:
        return _verdict("Degraded", True, "Refused", "; ".join(seen.refused))
    if LWS in seen.missing:
        return _verdict("Degraded", True, "LeaderWorkerSetMissing", _install(LWS.product))
    if failures:
        return _verdict("Degraded", True, failures[0].reason, "; ".join(map(_about, failures)))
    if seen.workload.refusal:
        return _verdict("Degraded", True, "PodsRefused", seen.workload.refusal)
    if seen.workload.is_stuck:
        text = "the pods did not become ready within lifecycle.startupTimeoutSeconds"
        return _verdict("Degraded", True, "ProgressDeadlineExceeded", text)
    return _verdict("Degraded", False, "AsExpected")


def _integrations(seen: Observation) -> Verdict:
    if not seen.missing:
        return _verdict("IntegrationsReady", True, "AllInstalled")
    text = "; ".join(
        f"{kind.kind} is unknown here: {_install(kind.product)}" for kind in seen.missing
    )
    return _verdict("IntegrationsReady", False, "APIMissing", text)


def _install(product: str) -> str:
    return f"install {product} in the cluster, or remove the part of the spec that needs it"


def _about(failure: Failure) -> str:
    where = f"container {failure.container} of " if failure.container else ""
    code = f" (exit status {failure.exit_code})" if failure.exit_code is not None else ""
    return f"{where}pod {failure.pod}: {failure.message or failure.reason}{code}"
