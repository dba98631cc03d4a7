"""`alise serve`: reads our options, leaves vLLM's to vLLM, and makes the plan to launch."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from alise_scheduler.policy import Policy

from alise_engine.default_model import (
    DEFAULT_MODEL_NAME,
    DefaultModelMissingError,
    ensure_default_model,
    has_fast_bfloat16,
)
from alise_engine.kv_tier.layout import Quantization
from alise_engine.launcher import (
    SCHEDULER_CLASS,
    Launcher,
    ServePlan,
    kv_transfer_config,
    vllm_command,
)
from alise_engine.settings import EngineSettings, SettingsError
from alise_engine.vllm_arguments import ServerAddress, has_option, option_value

# Small and quick to start, on a CPU; any of them may be given explicitly.
_DEFAULT_MODEL_OPTIONS = {
    "--dtype": ["auto" if has_fast_bfloat16() else "float32"],
    "--enforce-eager": [],
    "--max-model-len": ["2048"],
    "--max-num-seqs": ["16"],
}
ESTIMATE_HEADERS = "alise_engine.estimate_headers.EstimateHeaders"
DRAINING = "alise_engine.draining.Draining"
_RESERVED = ("--scheduler-cls",)

logger = logging.getLogger("alise.serve")
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
    epilog="Every other option is vLLM's: see `vllm serve --help`.",
)
def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [VLLM OPTIONS]...",
            help="The model as for `vllm serve` (default: the embedded SmolLM2-135M-Instruct), "
            "and any of vLLM's options.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--alise-scheduler",
            envvar="ALISE_SCHEDULER",
            metavar="ADDRESS",
            help="Use the sidecar at this address (unix:///path or host:port) instead of "
            "starting one.",
        ),
    ] = None,
    policy: Annotated[
        Policy,
        typer.Option("--alise-policy", envvar="ALISE_POLICY", help="How estimates order jobs."),
    ] = Policy.BOOST,
    gamma: Annotated[
        float | None,
        typer.Option(
            "--alise-gamma",
            envvar="ALISE_GAMMA",
            min=1e-6,
            help="Boost's gamma in 1/s; by default it follows the service times and the wait.",
        ),
    ] = None,
    first_tokens: Annotated[
        int,
        typer.Option(
            "--alise-first-tokens",
            envvar="ALISE_FIRST_TOKENS",
            min=0,
            help="Every new job gets this many tokens out early; later ones then wait longer.",
        ),
    ] = 0,
    encoder: Annotated[
        bool,
        typer.Option(
            "--alise-encoder/--no-alise-encoder",
            envvar="ALISE_ENCODER",
            help="Let a small language model read each prompt, on spare CPU time: predictions are "
            "much better, for 0.6 GB of memory.",
        ),
    ] = True,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            "--alise-state-dir",
            envvar="ALISE_STATE_DIR",
            file_okay=False,
            help="Where the sidecar keeps samples and models (default: ~/.local/state/alise).",
        ),
    ] = None,
    shared_dir: Annotated[
        Path | None,
        typer.Option(
            "--alise-shared-dir",
            envvar="ALISE_SHARED_DIR",
            file_okay=False,
            help="Private folder shared by engine and sidecar (default: a temporary one).",
        ),
    ] = None,
    metrics_port: Annotated[
        int,
        typer.Option(
            "--alise-metrics-port",
            envvar="ALISE_METRICS_PORT",
            min=0,
            max=65535,
            help="Port of the sidecar's status page and Prometheus metrics; 0: neither.",
        ),
    ] = 9464,
    preemption: Annotated[
        bool,
        typer.Option(
            "--alise-preemption/--no-alise-preemption",
            envvar="ALISE_PREEMPTION",
            help="Whether a running job may lose its slot to a better waiting one.",
        ),
    ] = True,
    margin_s: Annotated[
        float | None,
        typer.Option(
            "--alise-preemption-margin-s",
            envvar="ALISE_PREEMPTION_MARGIN_S",
            min=0.0,
            help="A job is preempted only if that saves a better one this many seconds of waiting, "
            "beyond what it costs (default: 0.25, without the KV tier 4).",
        ),
    ] = None,
    kv_host_gib: Annotated[
        float,
        typer.Option(
            "--alise-kv-host-gib",
            envvar="ALISE_KV_HOST_GIB",
            min=0.0,
            help="Host memory, at most, for the KV cache of preempted jobs; with 0 it is "
            "computed again.",
        ),
    ] = 4.0,
    kv_quantization: Annotated[
        Quantization,
        typer.Option(
            "--alise-kv-quantization",
            envvar="ALISE_KV_QUANTIZATION",
            help="How it is kept there: int8 takes half the bytes of bfloat16, none is exact.",
        ),
    ] = Quantization.INT8,
    drain_s: Annotated[
        int,
        typer.Option(
            "--alise-drain-s",
            envvar="ALISE_DRAIN_S",
            min=0,
            help="After SIGTERM, answers in progress get this long to end; new requests get 503.",
        ),
    ] = 30,
    estimate_headers: Annotated[
        bool,
        typer.Option(
            "--alise-estimate-headers",
            envvar="ALISE_ESTIMATE_HEADERS",
            help="Requests with the header `x-alise-estimate: 1` get the predicted length and the "
            "estimated time to finish in `x-alise-*` headers.",
        ),
    ] = False,
    oracle_file: Annotated[
        Path | None,
        typer.Option(
            "--alise-oracle-file",
            exists=True,
            dir_okay=False,
            help="For benchmarks: true lengths instead of predictions (docs/benchmark.md).",
        ),
    ] = None,
) -> None:
    """Serve a model with vLLM and the speculative scheduler."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    vllm_arguments, model_name = _with_model(list(arguments or []))
    for name in _RESERVED:
        if has_option(vllm_arguments, name):
            raise typer.BadParameter(
                f"{name} is set by `alise serve`; use `vllm serve` for another"
            )
    own_drain_s = option_value(vllm_arguments, "--shutdown-timeout")
    if own_drain_s is None:
        vllm_arguments += ["--shutdown-timeout", str(drain_s)]
    elif own_drain_s.isdigit():  # vLLM says what is wrong with another
        drain_s = int(own_drain_s)
    if not has_option(vllm_arguments, "--scheduling-policy"):
        # A request's own `priority` then means a class above our order; all 0 without one.
        vllm_arguments += ["--scheduling-policy", "priority"]
    if estimate_headers:
        vllm_arguments += ["--middleware", ESTIMATE_HEADERS]
    vllm_arguments += ["--middleware", DRAINING]  # the last one is asked first
    vllm_arguments += _kv_tier_arguments(vllm_arguments, kv_host_gib, kv_quantization)
    with tempfile.TemporaryDirectory(prefix="alise-") as temporary:
        run_dir = shared_dir or Path(temporary)
        socket = None if scheduler else run_dir / "scheduler.sock"
        environment = {
            **os.environ,
            "ALISE_SCHEDULER": scheduler or f"unix://{socket}",
            "ALISE_SHARED_DIR": str(run_dir),
            "ALISE_PREEMPTION": str(int(preemption)),
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        }
        # On CPUs vLLM sets one more core a rank aside where KV is transferred, for a process that
        # we do not have; on two cores it then sets none aside. So: as many as without the tier.
        environment.setdefault(
            "VLLM_CPU_NUM_OF_RESERVED_CPU",
            option_value(vllm_arguments, "--tensor-parallel-size", "-tp") or "1",
        )
        if margin_s is not None:
            environment["ALISE_PREEMPTION_MARGIN_S"] = str(margin_s)
        try:
            EngineSettings.from_env(environment)
        except SettingsError as error:
            raise typer.BadParameter(str(error)) from error
        sidecar_command = None
        if socket is not None:
            sidecar_command = _sidecar_command(
                socket,
                run_dir,
                state_dir,
                policy,
                gamma,
                first_tokens,
                encoder,
                metrics_port,
                oracle_file,
            )
        plan = ServePlan(
            model_name=model_name,
            engine_command=vllm_command([*vllm_arguments, "--scheduler-cls", SCHEDULER_CLASS]),
            engine_environment=environment,
            sidecar_command=sidecar_command,
            sidecar_socket=socket,
            server=ServerAddress.of(vllm_arguments),
            status_url=(
                f"http://localhost:{metrics_port}" if metrics_port and socket is not None else None
            ),
            drain_s=drain_s,
        )
        status = Launcher(plan).run()
    raise typer.Exit(status)


serve_command = typer.main.get_command(app)


def _with_model(arguments: list[str]) -> tuple[list[str], str]:
    """Return vLLM's arguments with a model, and the name that requests call it by."""
    named = option_value(arguments, "--served-model-name")
    if arguments and not arguments[0].startswith("-"):
        return arguments, named or arguments[0]
    model = option_value(arguments, "--model")
    if model is not None or has_option(arguments, "--config"):
        return arguments, named or model or "MODEL"
    try:
        folder = ensure_default_model()
    except DefaultModelMissingError as error:
        raise typer.BadParameter(str(error)) from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    for name, values in _DEFAULT_MODEL_OPTIONS.items():
        if not has_option(arguments, name):
            arguments += [name, *values]
    if named is None:
        arguments += ["--served-model-name", DEFAULT_MODEL_NAME]
    return [str(folder), *arguments], named or DEFAULT_MODEL_NAME


def _kv_tier_arguments(
    arguments: Sequence[str], host_gib: float, quantization: Quantization
) -> list[str]:
    """Return vLLM's arguments that put the KV tier behind the engine."""
    if host_gib == 0:
        return []
    if has_option(arguments, "--kv-transfer-config", "--kv-offloading-size"):
        logger.warning("The KV tier is off: vLLM's own KV transfer is configured")
        return []
    return ["--kv-transfer-config", kv_transfer_config(int(host_gib * 2**30), quantization)]


def _sidecar_command(
    socket: Path,
    run_dir: Path,
    state_dir: Path | None,
    policy: Policy,
    gamma: float | None,
    first_tokens: int,
    encoder: bool,
    metrics_port: int,
    oracle_file: Path | None,
) -> Sequence[str]:
    command = [sys.executable, "-m", "alise_scheduler", "scheduler"]
    command += ["--listen", f"unix://{socket}", "--shared-dir", str(run_dir)]
    command += ["--policy", policy.value, "--metrics-port", str(metrics_port)]
    command += ["--first-tokens", str(first_tokens)]
    command += ["--encoder" if encoder else "--no-encoder"]
    if state_dir is not None:  # the sidecar has its own default
        command += ["--state-dir", str(state_dir)]
    if gamma is not None:
        command += ["--gamma", str(gamma)]
    if oracle_file is not None:
        command += ["--oracle-file", str(oracle_file)]
    return command
