"""The sidecar's process: binds, serves until told to stop, and cleans up."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from alise_scheduler import protocol
from alise_scheduler.engine_state import EngineState, PolicySettings
from alise_scheduler.engines import Engines
from alise_scheduler.http_server import HttpPage, application
from alise_scheduler.listen import Address, ListenError, TcpAddress, UnixAddress, prepare_socket
from alise_scheduler.measured_predictor import MeasuredPredictor
from alise_scheduler.metrics import Metrics
from alise_scheduler.policy_file import POLL_S, PolicyFile
from alise_scheduler.predictor import Predictor
from alise_scheduler.service import SchedulerService
from alise_scheduler.shadow_runner import ShadowRunner
from alise_scheduler.status_source import StatusSource
from alise_scheduler.v1 import scheduler_pb2_grpc

_log = logging.getLogger(__name__)

_STOP_GRACE_S: Final = 1.0
_GAUGES_PERIOD_S: Final = 1.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", protocol.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", protocol.MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", protocol.MIN_PING_INTERVAL_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # Or a second sidecar would share the port and take half of the streams.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files; with `client_ca`, clients must show a certificate that it signed (mTLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where to listen, and how to serve."""

    address: Address
    tls: TlsFiles | None
    shared_dir: Path | None
    metrics_address: str
    metrics_port: int
    """0: no metrics and no status page."""
    grace_s: float
    policy: PolicySettings
    policy_file: Path | None = None
    """Wins over `policy`, and is followed as it changes."""


async def serve(settings: ServerSettings, predictor: Predictor) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises `ListenError` if an address cannot be had.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with running(settings, predictor, stopping) as target:
        _log.info("listening on %s, policy %s", target, settings.policy.policy.value)
        await stopping.wait()
        _log.info("stopping")


@asynccontextmanager
async def running(
    settings: ServerSettings, predictor: Predictor, stopping: asyncio.Event
) -> AsyncIterator[str]:
    """Run the server inside the block; yields the address in gRPC's notation.

    Leaving it sets `stopping`, ends the streams and removes the socket. Raises `ListenError`.
    """
    metrics = Metrics()
    measured = MeasuredPredictor(predictor, metrics)
    policy_file = PolicyFile(settings.policy_file, settings.policy)
    policy_file.refresh()
    engines = Engines(lambda: EngineState(measured, policy_file.settings), settings.grace_s)
    shadow = ShadowRunner()
    source = StatusSource(
        loop=asyncio.get_running_loop(),
        policy=lambda: policy_file.settings.policy,
        engines=engines,
        predictor=predictor,
        metrics=metrics,
        shadow=shadow,
    )
    service = SchedulerService(
        measured,
        engines,
        metrics,
        policy_file.settings.policy,
        settings.shared_dir,
        stopping,
        source.status,
    )
    server = grpc.aio.server(options=_OPTIONS)
    health_servicer = health.aio.HealthServicer()
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (protocol.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    target = _bind(server, settings)
    page = _start_page(settings, metrics, source)
    predictor.start(asyncio.get_running_loop().call_soon_threadsafe)
    shadow.start()
    background = [asyncio.create_task(_follow(metrics, engines, predictor, shadow))]
    if settings.policy_file is not None:
        background.append(asyncio.create_task(_follow_policy(policy_file, engines, service)))
    try:
        await server.start()
        await health_servicer.set(
            protocol.SERVICE_NAME, health_pb2.HealthCheckResponse.ServingStatus.SERVING
        )
        yield target
    finally:
        stopping.set()
        await health_servicer.enter_graceful_shutdown()
        await server.stop(_STOP_GRACE_S)
        for task in background:
            task.cancel()
        shadow.close()
        predictor.close()
        if page is not None:
            page.close()
        if isinstance(settings.address, UnixAddress):
            with suppress(OSError):
                settings.address.path.unlink()


def _bind(server: grpc.aio.Server, settings: ServerSettings) -> str:
    address = settings.address
    if isinstance(address, UnixAddress):
        prepare_socket(address)
        previous = os.umask(0o177)
        try:
            return _add_port(server, address, None)
        finally:
            os.umask(previous)
    return _add_port(server, address, settings.tls)


def _add_port(server: grpc.aio.Server, address: Address, tls: TlsFiles | None) -> str:
    try:
        if tls is None:
            port = server.add_insecure_port(address.target)
        else:
            port = server.add_secure_port(address.target, _credentials(tls))
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address.target}: {error}") from error
    if isinstance(address, TcpAddress):
        return TcpAddress(address.host, port).target
    return address.target


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    try:
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        client_ca = tls.client_ca.read_bytes() if tls.client_ca else None
    except OSError as error:
        raise ListenError(f"cannot read a TLS file: {error}") from error
    return grpc.ssl_server_credentials(
        [pair], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _start_page(
    settings: ServerSettings, metrics: Metrics, source: StatusSource
) -> HttpPage | None:
    if not settings.metrics_port:
        return None
    try:
        return HttpPage(
            settings.metrics_address,
            settings.metrics_port,
            application(metrics.registry, source.status),
        )
    except OSError as error:
        raise ListenError(
            f"cannot serve metrics on {settings.metrics_address}:{settings.metrics_port}: {error}; "
            "pass another --metrics-port, or 0 for none"
        ) from error


async def _follow(
    metrics: Metrics, engines: Engines, predictor: Predictor, shadow: ShadowRunner
) -> None:
    while True:
        shadow.feed(engines)
        metrics.show_shadow(shadow.ratios)
        await metrics.show_engines(engines, engines.connected)
        metrics.show_predictor(predictor, predictor.quality())
        await asyncio.sleep(_GAUGES_PERIOD_S)


async def _follow_policy(file: PolicyFile, engines: Engines, service: SchedulerService) -> None:
    while True:
        await asyncio.sleep(POLL_S)
        if file.refresh():
            _log.info("policy %s from %s", file.settings.policy.value, file.path)
            service.policy = file.settings.policy
            for _, state in engines:
                state.choose(file.settings)
