"""Which models the KV tier serves, how it is asked for, and what happens without it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alise_bench.scheduler_setup import build_scheduler
from alise_engine import scheduler as plugin
from alise_engine.cli import _kv_tier_arguments
from alise_engine.kv_tier import spec as spec_module
from alise_engine.kv_tier.layout import Quantization, TierTooSmallError
from alise_engine.kv_tier.spec import QuantizedOffloadingSpec, unsupported_reason
from alise_engine.scheduler import AliseScheduler
from fakes import FakeClient
from kv_tier_harness import TierEngine
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_configs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm_factories import create_request

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 1,
    "head_size": 64,
    "dtype": torch.bfloat16,
}
FULL = FullAttentionSpec(**SHAPE)


def vllm_config(
    cache_dtype: str = "auto", context_parallel: int = 1, pipeline_parallel: int = 1
) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=context_parallel,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=pipeline_parallel,
        ),
    )


def cache_of(*specs: KVCacheSpec) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("config", "cache", "quantization", "reason"),
    [
        pytest.param(vllm_config(), cache_of(FULL), "int8", None, id="plain"),
        pytest.param(vllm_config("fp8"), cache_of(FULL), "none", None, id="fp8, kept exact"),
        pytest.param(
            vllm_config("fp8"), cache_of(FULL), "int8", "--alise-kv-quantization none", id="fp8"
        ),
        pytest.param(vllm_config(), cache_of(FULL, FULL), "int8", "hybrid", id="hybrid"),
        pytest.param(
            vllm_config(), cache_of(MLAAttentionSpec(**SHAPE)), "int8", "MLAAttention", id="MLA"
        ),
        pytest.param(
            vllm_config(),
            cache_of(SlidingWindowSpec(**SHAPE, sliding_window=128)),
            "int8",
            "SlidingWindow",
            id="sliding window",
        ),
        pytest.param(
            vllm_config(),
            cache_of(FullAttentionSpec(**SHAPE, num_head_slots=2, state_content_bytes=128)),
            "int8",
            "head by head",
            id="K of all heads, then V (ROCm)",
        ),
        pytest.param(
            vllm_config(),
            cache_of(FullAttentionSpec(**SHAPE, head_size_v=32)),
            "none",
            None,
            id="K and V of two sizes, kept exact",
        ),
        pytest.param(
            vllm_config(),
            cache_of(FullAttentionSpec(**SHAPE, head_size_v=32)),
            "int8",
            "--alise-kv-quantization none",
            id="K and V of two sizes",
        ),
        pytest.param(
            vllm_config(context_parallel=2), cache_of(FULL), "int8", "context parallel", id="DCP"
        ),
        pytest.param(
            vllm_config(pipeline_parallel=2), cache_of(FULL), "int8", "pipeline", id="pipeline"
        ),
    ],
)
def test_models(config: Any, cache: KVCacheConfig, quantization: str, reason: str | None) -> None:
    found = unsupported_reason(config, cache, Quantization(quantization))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        pytest.param(FULL, None, id="of the model's shape"),
        pytest.param(
            FullAttentionSpec(**SHAPE | {"head_size": 32}), "differ in shape", id="another shape"
        ),
        pytest.param(
            FullAttentionSpec(**SHAPE | {"num_kv_heads": 2, "head_size": 32}),
            "differ in shape",
            id="another shape of the same size",
        ),
    ],
)
def test_a_draft_models_layers_are_judged_alike_by_scheduler_and_workers(
    draft: KVCacheSpec, reason: str | None, tmp_path: Path
) -> None:
    config = build_scheduler(AsyncScheduler, tmp_path).vllm_config
    config.cache_config.num_gpu_blocks_override = 300
    config.cache_config.kv_cache_layout = "LBHNC"
    layers = {"layer 0": FULL, "layer 1": FULL, "draft layer 0": draft}
    (of_worker,) = get_kv_cache_configs(config, [layers], [1 << 30])
    of_scheduler = generate_scheduler_kv_cache_config([of_worker])
    for cache in (of_worker, of_scheduler):
        found = unsupported_reason(config, cache, Quantization.INT8)
        assert found is None if reason is None else reason in str(found)


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALISE_SCHEDULER", "unix:///nobody.sock")
    monkeypatch.setattr(plugin, "SidecarClient", FakeClient)


@pytest.mark.usefixtures("ranked")
def test_an_unsupported_model_is_served_without_the_tier_and_a_warning_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spec_module, "unsupported_reason", lambda *_: "it is a test")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        engine = TierEngine(AliseScheduler, tmp_path, slots=4, blocks=41)
    assert "The KV tier is off for this model: it is a test" in caplog.text
    for _ in range(4):
        engine.scheduler.add_request(create_request(prompt_tokens=100, max_tokens=200))
    engine.run(4)  # vLLM preempts for want of blocks, and computes again
    assert not engine.restored_jobs


@pytest.mark.usefixtures("ranked")
def test_a_worker_without_the_tier_loses_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The scheduler believes in the tier: it stores and loads, and nothing is ever there.
    monkeypatch.setattr(QuantizedOffloadingSpec, "get_worker", lambda *_: spec_module._NoWorker())
    engine = TierEngine(AliseScheduler, tmp_path, slots=4, blocks=41)
    for _ in range(4):
        engine.scheduler.add_request(create_request(prompt_tokens=100, max_tokens=200))
    engine.run(4)
    assert engine.restored_jobs, "a load was tried"
    engine.settle()
    assert engine.tier.manager.used_slots() == 0


@pytest.mark.usefixtures("ranked")
def test_a_bound_below_one_block_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TierTooSmallError, match="--alise-kv-host-gib"):
        TierEngine(AliseScheduler, tmp_path, host_bytes=1000)


def test_the_launcher_asks_vllm_for_it() -> None:
    option, value = _kv_tier_arguments([], 1.5, Quantization.NONE)
    config = json.loads(value)
    assert option == "--kv-transfer-config"
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"] == {
        "host_bytes": 3 << 29,
        "quantization": "none",
    }


def test_zero_turns_it_off() -> None:
    assert _kv_tier_arguments([], 0.0, Quantization.INT8) == []


@pytest.mark.parametrize("own", ["--kv-transfer-config={}", "--kv_offloading_size"])
def test_a_kv_transfer_of_the_users_own_goes_first(
    own: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert _kv_tier_arguments([own, "4"], 4.0, Quantization.INT8) == []
    assert "The KV tier is off" in caplog.text
