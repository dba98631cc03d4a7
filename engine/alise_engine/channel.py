"""How the engine's processes dial the sidecar: options and credentials of a gRPC channel."""

from __future__ import annotations

import grpc
from alise_scheduler import protocol

from alise_engine.settings import TlsFiles

_KEEPALIVE_MS = 10_000

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", protocol.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", protocol.MAX_MESSAGE_BYTES),
    # A peer that is gone without a word (a cut cable) is noticed by unanswered pings.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


def credentials(tls: TlsFiles | None) -> grpc.ChannelCredentials | None:
    """Read the PEM files; None without TLS. Raises `OSError`."""
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=tls.ca.read_bytes() if tls.ca else None,
        private_key=tls.key.read_bytes() if tls.key else None,
        certificate_chain=tls.certificate.read_bytes() if tls.certificate else None,
    )
