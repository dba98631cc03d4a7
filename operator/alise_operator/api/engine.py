"""`spec.engine`, `spec.lora` and `spec.speculativeDecoding`: how vLLM runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alise_operator.api.base import (
    ATOMIC,
    ApiModel,
    EnvVar,
    Image,
    Resources,
    Text,
    keyed_by,
    rules,
)

_RESERVED = (
    "host|port|served-model-name|scheduler-cls|alise-scheduler|alise-shared-dir|alise-drain-s|"
    "tensor-parallel-size|pipeline-parallel-size"
)


class Parallelism(ApiModel):
    """How one replica is spread over accelerators."""

    tensor: Annotated[int, Field(ge=1, le=64)] = 1
    """Tensor parallel size."""
    pipeline: Annotated[int, Field(ge=1, le=64)] = 1
    """Pipeline parallel size."""


class Accelerator(ApiModel):
    """The accelerators of one replica."""

    resource_name: Annotated[
        str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", max_length=128)
    ] = "nvidia.com/gpu"
    """Extended resource that the device plug-in advertises."""
    count: Annotated[int, Field(ge=0, le=512)] = 1
    """Accelerators of one replica, over all its nodes; 0 serves on the CPU."""
    per_node: Annotated[int, Field(ge=1, le=64)] | None = None
    """Accelerators that one node can give; fewer than count makes a replica span nodes
    (LeaderWorkerSet)."""


class EngineSpec(ApiModel):
    """The engine container: vLLM with ALISE's plug-ins."""

    model_config = rules(
        (
            "self.parallelism.tensor * self.parallelism.pipeline == "
            "(self.accelerator.count == 0 ? 1 : self.accelerator.count)",
            "engine.parallelism.tensor * pipeline must equal engine.accelerator.count "
            "(1 * 1 with count 0, on the CPU): change one of the three",
        ),
        (
            "!has(self.accelerator.perNode) || "
            "self.accelerator.count % self.accelerator.perNode == 0",
            "engine.accelerator.count must be a multiple of engine.accelerator.perNode",
        ),
        (
            f"self.args.all(a, !a.matches('^--({_RESERVED})(=.*)?$'))",
            "engine.args has an option that the operator sets: use model.servedName, "
            "engine.parallelism, lifecycle.drainSeconds or exposure.service.port instead",
        ),
    )

    image: Image | None = None
    """Image of the engine; by default the operator's, pinned in status.resolvedImages."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the engine's and the predictor's images are pulled."""
    args: Annotated[tuple[Text, ...], Field(max_length=64, json_schema_extra=ATOMIC)] = ()
    """More options of `alise serve` and `vllm serve`, appended to the operator's."""
    env: Annotated[
        tuple[EnvVar, ...], Field(max_length=64, json_schema_extra=keyed_by("name"))
    ] = ()
    """More environment variables of the engine."""
    max_model_len: Annotated[int, Field(ge=1, le=16777216)] | None = None
    """Longest context in tokens, prompt and answer; by default the model's."""
    gpu_memory_utilization_percent: Annotated[int, Field(ge=10, le=99)] = 90
    """Share of each accelerator's memory that vLLM takes; on the CPU: of resources.memoryGiB, less
    2 GiB for the engine's other processes, unless engine.env sets VLLM_CPU_KVCACHE_SPACE (the KV
    cache in GiB; for the embedded model 2 by default)."""
    parallelism: Parallelism = Parallelism()
    """How one replica is spread over its accelerators."""
    accelerator: Accelerator = Accelerator()
    """The accelerators of one replica."""
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """Type of the KV cache on the device."""
    resources: Resources = Resources(cpu="4", memory_gib=16)
    """CPU and memory of the engine; shared memory and the KV host tier are added to it."""
    shm_gib: Annotated[int, Field(ge=1, le=1024)] = 2
    """Size of /dev/shm in GiB, which counts as memory of the pod; tensor parallelism needs more."""


class SpeculativeDecoding(ApiModel):
    """Guess several tokens at once and verify them in one step."""

    model_config = rules(
        (
            "self.method == 'ngram' || has(self.model)",
            "speculativeDecoding.model is needed for this method: "
            "name the draft model, or use method ngram",
        )
    )

    method: Literal["ngram", "draft_model", "eagle", "eagle3"]
    """How tokens are guessed: from the prompt (ngram), or by another model."""
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """The draft model, as vLLM takes it: ORGANISATION/NAME or a path in the container."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=32)] = 4
    """Tokens guessed per step."""
    prompt_lookup_max: Annotated[int, Field(ge=1, le=64)] = 4
    """ngram: the longest sequence that is looked up in the prompt."""


class LoraAdapter(ApiModel):
    """One adapter, asked for by its name as `model`."""

    model_config = rules(
        (
            "self.uri.startsWith('hf://') || self.uri.startsWith('pvc://')",
            "lora.adapters[].uri must start with hf:// or pvc://, for example hf://org/adapter",
        )
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=63)]
    """The name that clients ask for."""
    uri: Annotated[str, Field(min_length=6, max_length=512)]
    """Where the adapter is: hf://ORGANISATION/NAME or pvc://CLAIM/PATH."""


class LoraSpec(ApiModel):
    """LoRA adapters served beside the base model."""

    adapters: Annotated[
        tuple[LoraAdapter, ...],
        Field(min_length=1, max_length=32, json_schema_extra=keyed_by("name")),
    ]
    """The adapters."""
    max_rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Largest rank of any of them; a value that vLLM knows (8, 16, 32, 64, 128, 256, 320 or
    512)."""
    max_loaded: Annotated[int, Field(ge=1, le=32)] = 1
    """Adapters that one batch may mix."""
