"""The engine's end of the stream to the scheduler sidecar.

The stream lives in threads of its own. The scheduler thread only appends records to a queue and
takes received estimates from another; it never waits for the sidecar, whatever state that is in.
This module does not know what the estimates are used for.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from alise_scheduler import protocol
from alise_scheduler.v1 import scheduler_pb2 as pb
from alise_scheduler.v1 import scheduler_pb2_grpc as pb_grpc

from alise_engine import metrics
from alise_engine.channel import CHANNEL_OPTIONS, credentials
from alise_engine.events import EngineEvent, Snapshot, to_messages
from alise_engine.settings import TlsFiles

logger = logging.getLogger("vllm.alise.client")

MAX_QUEUED_EVENTS = 50_000
"""More than this unsent means that the sidecar hangs: start over with a snapshot."""
_EVENTS_PER_MESSAGE = 500
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0
_CONNECT_TIMEOUT_S = 2.0
# An estimate older than this many messages waiting to be applied is not worth keeping.
_MAX_RECEIVED = 200_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the sidecar says of one job."""

    job_id: str
    priority: float
    remaining_tokens: float | None
    at_output_tokens: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that a token costs at the present load."""

    prefill_s_per_token: float
    decode_s_per_token: float


DEFAULT_COSTS = Costs(prefill_s_per_token=0.0005, decode_s_per_token=0.05)


class Connection:
    """One stream's outgoing queue; a reconnect gets a new one, so nothing old leaks into it."""

    def __init__(self) -> None:
        self.outgoing: queue.SimpleQueue[EngineEvent | None] = queue.SimpleQueue()
        self.has_snapshot = False  # written by the scheduler thread alone


class SidecarClient:
    """Keeps a `Session` stream open, for ever; every method returns at once."""

    def __init__(
        self, address: str, tls: TlsFiles | None, make_hello: Callable[[], pb.Hello]
    ) -> None:
        self._address = address
        self._tls = tls
        self._make_hello = make_hello
        self._connection: Connection | None = None
        self._received: deque[Estimate] = deque(maxlen=_MAX_RECEIVED)
        self._stopping = threading.Event()
        self._call: grpc.Call | None = None
        self._down_since_s: float | None = time.monotonic()
        self._heard_s = time.monotonic()
        self._logged_reason: str | None = None
        self.costs = DEFAULT_COSTS
        self._thread = threading.Thread(target=self._run, name="alise-stream", daemon=True)

    def start(self) -> None:
        """Start connecting, in the background."""
        self._thread.start()

    def stop(self) -> None:
        """End the stream."""
        self._stopping.set()
        self._hang_up()
        self._thread.join(timeout=2.0)

    def down_for_s(self, now_s: float) -> float:
        """Return for how long there has been no stream, or none that says anything; else 0."""
        since = self._down_since_s
        if since is not None:
            return now_s - since
        quiet_s = now_s - self._heard_s
        return quiet_s if quiet_s > 2 * protocol.HEARTBEAT_S else 0.0

    # The scheduler thread's side.

    def wants_snapshot(self) -> bool:
        """Say whether a new stream waits for the live jobs before it takes other events."""
        connection = self._connection
        return connection is not None and not connection.has_snapshot

    def send_snapshot(self, snapshot: Snapshot) -> None:
        """Send all live jobs; from here on the stream takes events."""
        connection = self._connection
        if connection is not None:
            connection.outgoing.put(snapshot)
            connection.has_snapshot = True

    def send(self, event: EngineEvent) -> None:
        """Queue `event`; dropped without a stream, as the next snapshot will say it anyway."""
        connection = self._connection
        if connection is None or not connection.has_snapshot:
            return
        if connection.outgoing.qsize() > MAX_QUEUED_EVENTS:
            self.start_over()
            return
        connection.outgoing.put(event)

    def start_over(self) -> None:
        """End the stream if there is one; the next one gets, and answers, all live jobs."""
        self._hang_up()
        self._connection = None

    def receive(self, limit: int) -> list[Estimate]:
        """Return up to `limit` estimates, in the order in which they came."""
        received = self._received
        return [received.popleft() for _ in range(min(limit, len(received)))]

    # The stream's threads.

    def _hang_up(self) -> None:
        connection, call = self._connection, self._call
        if connection is not None:
            connection.outgoing.put(None)
        if call is not None:
            call.cancel()

    def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            try:
                self._serve_one_stream()
            except grpc.RpcError as error:
                self._log_down(_describe(error))
            except grpc.FutureTimeoutError:
                self._log_down(f"nobody answers at {self._address}")
            except Exception:
                logger.exception("The stream to the scheduler sidecar failed")
            else:
                self._log_down("it was closed")
            self._went_down()
            if time.monotonic() - began_s > _LAST_RETRY_S:
                retry_s = _FIRST_RETRY_S
            self._stopping.wait(retry_s * random.uniform(0.5, 1.0))  # noqa: S311 # jitter
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    def _log_down(self, reason: str) -> None:
        # Once for each outage: retries go on every few seconds, for ever.
        if self._logged_reason != reason and not self._stopping.is_set():
            self._logged_reason = reason
            logger.warning(
                "No stream to the scheduler sidecar, jobs are ordered by arrival: %s", reason
            )

    def _went_down(self) -> None:
        self._connection = None
        self._call = None
        if self._down_since_s is None:
            self._down_since_s = time.monotonic()
        metrics.SIDECAR_CONNECTED.set(0)

    def _channel(self) -> grpc.Channel:
        tls = credentials(self._tls)
        if tls is None:
            return grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(self._address, tls, options=CHANNEL_OPTIONS)

    def _serve_one_stream(self) -> None:
        """Open a stream and take its messages until it ends; raises grpc.RpcError."""
        hello = self._make_hello()
        with self._channel() as channel:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_TIMEOUT_S)
            connection = Connection()
            call = pb_grpc.SchedulerStub(channel).Session(_outgoing(connection, hello))
            self._call = call
            try:
                for message in call:
                    self._take(message, connection)
                    if self._stopping.is_set():
                        return
            finally:
                connection.outgoing.put(None)
                call.cancel()

    def _take(self, message: pb.SidecarMessage, connection: Connection) -> None:
        self._heard_s = time.monotonic()
        kind = message.WhichOneof("body")
        if kind == "welcome":
            welcome = message.welcome
            logger.info(
                "Scheduler sidecar %s at %s: policy %s, model version %d",
                welcome.sidecar_version,
                self._address,
                welcome.policy,
                welcome.model_version,
            )
            self._connection = connection
            self._down_since_s = None
            self._logged_reason = None
            metrics.SIDECAR_CONNECTED.set(1)
        elif kind == "update":
            self._take_update(message.update)

    def _take_update(self, update: pb.EstimateUpdate) -> None:
        if update.HasField("cost_model"):
            costs = Costs(
                update.cost_model.prefill_s_per_token, update.cost_model.decode_s_per_token
            )
            if _is_positive(costs.prefill_s_per_token) and _is_positive(costs.decode_s_per_token):
                self.costs = costs
            else:
                metrics.ESTIMATES_REFUSED.inc()
        for item in update.estimates:
            if not (math.isfinite(item.priority) and 0 <= item.remaining_tokens < math.inf):
                metrics.ESTIMATES_REFUSED.inc()
                continue
            self._received.append(
                Estimate(
                    job_id=item.job_id,
                    priority=item.priority,
                    remaining_tokens=item.remaining_tokens or None,
                    at_output_tokens=item.at_output_tokens,
                )
            )


def _outgoing(connection: Connection, hello: pb.Hello) -> Iterator[pb.EngineMessage]:
    """Yield the messages of one stream; blocks in gRPC's own thread. None ends it."""
    sequence = 1
    yield _message(sequence, [pb.Event(hello=hello)])
    while (event := connection.outgoing.get()) is not None:
        events = to_messages(event)
        # What has gathered meanwhile goes along; a snapshot's parts are large and go alone.
        while len(events) < _EVENTS_PER_MESSAGE and not isinstance(event, Snapshot):
            try:
                event = connection.outgoing.get_nowait()
            except queue.Empty:
                break
            if event is None:
                return
            events.extend(to_messages(event))
        for part in _bounded(events):
            sequence += 1
            yield _message(sequence, part)


def _bounded(events: list[pb.Event]) -> Iterator[list[pb.Event]]:
    """Split `events` so that no message comes near the contract's bounds."""
    part: list[pb.Event] = []
    size_bytes = count = 0
    for event in events:
        event_bytes = event.ByteSize()
        event_count = 1 + len(event.snapshot.jobs) + len(event.snapshot.progress)
        if part and (
            size_bytes + event_bytes > protocol.MAX_MESSAGE_BYTES // 2
            or count + event_count > protocol.MAX_EVENTS
        ):
            yield part
            part, size_bytes, count = [], 0, 0
        part.append(event)
        size_bytes += event_bytes
        count += event_count
    if part:
        yield part


def _message(sequence: int, events: list[pb.Event]) -> pb.EngineMessage:
    return pb.EngineMessage(sequence=sequence, sent_s=time.monotonic(), events=events)


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _describe(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
