"""`alise profile`: a hardware profile of a running engine, from its own metrics.

The sidecar fits the step cost to the engine's real steps as it serves, and the KV tier measures
its copies; here both are read, and nothing is put under load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

import httpx
import typer
from alise_scheduler.cost_model import StepCost
from alise_scheduler.replica import Hardware
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from alise_bench.command_line import fail
from alise_bench.errors import BenchError
from alise_bench.simulation.profiles import Profile, TierSpeed, save_profile

app = typer.Typer(add_completion=False)

Samples: TypeAlias = Mapping[str, list[tuple[Mapping[str, str], float]]]
"""Labels and value of each sample, by metric name."""

_TIMEOUT_S = 10.0


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="JSON file to write, for `alise simulate`.")],
    slots: Annotated[int, typer.Option(min=1, help="The engine's --max-num-seqs.")],
    engine: Annotated[
        str, typer.Option(help="The engine's metrics page.")
    ] = "http://127.0.0.1:8000/metrics",
    sidecar: Annotated[
        str, typer.Option(help="The sidecar's metrics page.")
    ] = "http://127.0.0.1:9464/metrics",
    batched_tokens: Annotated[
        int, typer.Option(min=1, help="The engine's --max-num-batched-tokens.")
    ] = 2048,
    host_gib: Annotated[
        float, typer.Option(min=0.0, help="The engine's --alise-kv-host-gib.")
    ] = 4.0,
    copies_in_step: Annotated[
        bool, typer.Option(help="Copies take the engine's own time, as on a CPU.")
    ] = False,
    name: Annotated[str, typer.Option(help="How reports call it.")] = "measured",
) -> None:
    """Measure a running engine: what a step costs, how much KV fits, how fast copies are."""
    console = Console(stderr=True)
    try:
        measured = profile_of(
            _page("--engine", engine),
            _page("--sidecar", sidecar),
            name=name,
            slots=slots,
            batched_tokens=batched_tokens,
            host_bytes=host_gib * 2**30,
            is_in_step=copies_in_step,
        )
        save_profile(measured, out)
    except (BenchError, OSError) as error:
        fail(error)
    tier = "with" if measured.tier else "without (nothing was preempted and restored yet)"
    console.print(f"written: {out}, {tier} a KV tier; use: alise simulate --profile {out}")


def _page(option: str, url: str) -> Samples:
    try:
        response = httpx.get(url, timeout=_TIMEOUT_S)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BenchError(f"{option} {url}: {error}; does it run, is that its address?") from error
    return samples(response.text)


def samples(text: str) -> Samples:
    """Parse a page in Prometheus' text format."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def profile_of(
    engine: Samples,
    sidecar: Samples,
    *,
    name: str,
    slots: int,
    batched_tokens: int,
    host_bytes: float,
    is_in_step: bool,
) -> Profile:
    """Return the profile that two metrics pages describe. Raises `BenchError` if one is missing.

    The tier is left out until a preempted job has come back: its copies are unmeasured until then.
    """
    costs = {
        labels["coefficient"]: value
        for labels, value in sidecar.get("alise_cost_model_seconds", [])
    }
    try:
        step = StepCost(
            costs["base"], costs["prefill_token"], costs["decode_job"], costs["context_token"]
        )
    except KeyError as error:
        raise BenchError(
            "the sidecar has no cost model yet: let the engine answer some requests first"
        ) from error
    try:
        (info, _), *_ = engine["vllm:cache_config_info"]
        block_tokens, blocks = int(info["block_size"]), int(info["num_gpu_blocks"])
    except (KeyError, ValueError) as error:
        raise BenchError(
            "the engine's page has no vllm:cache_config_info: is it vLLM's?"
        ) from error
    return Profile(
        name=name,
        source="measured by `alise profile`",
        hardware=Hardware(step, slots, blocks * block_tokens, block_tokens, batched_tokens),
        tier=_tier(engine, host_bytes, is_in_step),
    )


def _tier(engine: Samples, host_bytes: float, is_in_step: bool) -> TierSpeed | None:
    def by_direction(metric: str) -> dict[str, float]:
        return {labels["direction"]: value for labels, value in engine.get(metric, [])}

    moved = by_direction("alise_kv_tier_moved_bytes_total")
    speed = by_direction("alise_kv_tier_bandwidth_bytes_per_second")
    restored = sum(value for _, value in engine.get("alise_kv_tier_restored_tokens_total", []))
    if not restored or not speed.get("store") or not speed.get("load"):
        return None
    bytes_per_token = moved["load"] / restored
    return TierSpeed(
        store_s_per_token=bytes_per_token / speed["store"],
        load_s_per_token=bytes_per_token / speed["load"],
        host_tokens=int(host_bytes / bytes_per_token),
        is_in_step=is_in_step,
    )
