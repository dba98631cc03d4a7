"""`spec.scheduling`, `spec.kvSwap` and `spec.predictor`: the scheduler's own choices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alise_operator.api.base import ApiModel, Image, Name, Resources, rules


class Preemption(ApiModel):
    """Whether a running job may lose its slot to a better waiting one."""

    enabled: bool = True
    """Allow preemption. A change restarts the engine."""
    margin_seconds: Annotated[int, Field(ge=0, le=3600)] | None = None
    """Preempt only if that saves this much waiting, beyond its cost; by default the engine's own
    choice, which depends on the KV tier. A change restarts the engine."""


class SchedulingSpec(ApiModel):
    """How jobs are ordered. policy, gammaMilli and agingSeconds change without a restart."""

    policy: Literal["Boost", "SpeculativeSRTF", "MLFQ", "FCFS"] = "Boost"
    """Boost: short jobs first, within a bound on overtaking. SpeculativeSRTF: shortest
    predicted remaining time. MLFQ: by service so far. FCFS: by arrival."""
    gamma_milli: Annotated[int, Field(ge=1, le=1000000)] | None = None
    """Boost's gamma in thousandths per second: smaller favours the mean, larger the tail; by
    default it follows the load."""
    aging_seconds: Annotated[int, Field(ge=0, le=86400)] = 30
    """SpeculativeSRTF: a wait this long makes up for e times the work; 0 turns aging off."""
    preemption: Preemption = Preemption()
    """Whether a running job may lose its slot."""
    on_predictor_failure: Literal["FCFS"] = "FCFS"
    """The order while there are no predictions: by arrival, as in stock vLLM."""


class KvSwapSpec(ApiModel):
    """The host tier that keeps the KV cache of preempted jobs."""

    model_config = rules(
        (
            "!self.enabled || self.hostGiB > 0",
            "kvSwap.hostGiB must be above 0 when kvSwap is enabled: "
            "give the host tier memory, or disable it",
        )
    )

    enabled: bool = True
    """Swap the KV cache of preempted jobs to host memory instead of dropping it."""
    host_gib: Annotated[int, Field(ge=0, le=4096)] = 4
    """Size of the tier in GiB; it is added, with headroom, to the engine's memory request and
    limit."""
    quantization: Literal["int8", "none"] = "int8"
    """How blocks are stored."""


class Retrain(ApiModel):
    """Online learning of answer lengths."""

    max_samples: Annotated[int, Field(ge=100, le=1000000)] = 8000
    """Finished jobs kept to learn from."""


class ModelRef(ApiModel):
    """A trained predictor to start from, as `alise predictor train` leaves it."""

    claim_name: Name
    """PersistentVolumeClaim that holds it."""
    path: Annotated[str, Field(max_length=512, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] = "alise"
    """Folder on the claim."""


class PredictorSpec(ApiModel):
    """The scheduler sidecar, which predicts answer lengths and ranks jobs."""

    image: Image | None = None
    """Image of the sidecar; by default the operator's, pinned in status.resolvedImages."""
    resources: Resources = Resources(cpu="500m", memory_gib=2)
    """CPU and memory of the sidecar, its training and its prompt encoder."""
    retrain: Retrain = Retrain()
    """Online learning of answer lengths."""
    model_ref: ModelRef | None = None
    """A trained predictor to start from; by default it learns from nothing."""
