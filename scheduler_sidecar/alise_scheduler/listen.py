"""Where the sidecar listens: addresses as values, and the Unix socket's file.

Knows the file system but not gRPC.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

_MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path, less its closing zero


class ListenError(Exception):
    """The sidecar cannot listen where it was told to; the text says why."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix domain socket."""

    path: Path

    @property
    def target(self) -> str:
        """Return the address in gRPC's notation."""
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port; port 0 lets the system choose one."""

    host: str
    port: int

    @property
    def target(self) -> str:
        """Return the address in gRPC's notation."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


Address: TypeAlias = UnixAddress | TcpAddress


def default_address() -> UnixAddress:
    """Return the socket in this user's own folder under /tmp."""
    return UnixAddress(Path(f"/tmp/alise-{os.getuid()}/scheduler.sock"))  # noqa: S108


def parse_address(text: str) -> Address:
    """Return the address that `unix:PATH`, `unix:///PATH` or `HOST:PORT` names.

    Raises `ValueError`, saying what is allowed.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path[2:] if path.startswith("///") else path
        if not path or path.endswith("/") or path.startswith("//"):
            raise ValueError("allowed are unix:PATH, with the path of a file, and HOST:PORT")
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"the path has {len(os.fsencode(path))} bytes; "
                f"the system allows {_MAX_SOCKET_PATH_BYTES} for a Unix socket"
            )
        return UnixAddress(Path(path))
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("allowed are unix:PATH and HOST:PORT, with a port of 0 to 65535")
    return TcpAddress(host, int(port))


def prepare_socket(address: UnixAddress) -> None:
    """Make the socket's folder (0700) and remove a socket that no process serves any more.

    Raises `ListenError` if a live process serves it, or the folder is another user's or no folder.
    """
    folder = address.path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner, is_own = folder.stat().st_uid, address == default_address()
        if is_own and owner != os.getuid():
            raise ListenError(f"{folder} belongs to user {owner}: remove it or pass --listen")
        if not address.path.exists():
            return
        if not stat.S_ISSOCK(address.path.stat().st_mode):
            raise ListenError(f"{address.path} exists and is not a socket: remove it first")
        if _is_served(address.path):
            raise ListenError(
                f"{address.path} is served by another process: stop it or pass another --listen"
            )
        address.path.unlink()
    except OSError as error:
        raise ListenError(f"cannot listen on {address.path}: {error}") from error


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except TimeoutError:
            return True  # its backlog is full: somebody holds it
        return True
