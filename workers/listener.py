"""The listener: a socket that our own small servers wait on, out of reach of other machines.

Called by `workers.mailserver` and `workers.lmtp`. When `listening_socket` returns, the socket is bound and nobody
else has it; who may connect to one with a path was settled before it could be found. Errors: `NotReady`.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from outbox.errors import NotReady
from workers.relay import Target, is_loopback


def listening_socket(target: Target, *, mode: int = 0o600) -> socket.socket:
    """A bound socket: on a path with these permissions, or on loopback. Raises `NotReady`."""
    if isinstance(target, str):
        return _unix_socket(Path(target), mode)
    host, port = target
    if not is_loopback(host):
        raise NotReady("this server takes mail from everybody: let it listen on loopback or a unix socket")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise NotReady(f"port {port} can't be had ({error.strerror}): stop what uses it, or choose another") from None
    return sock


def _unix_socket(path: Path, mode: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            _must_be_dead(path)
            path.unlink()
        # Bound under another name: between bind and chmod nobody else may find it.
        unborn = path.with_name(f".{path.name[:8]}.{os.getpid()}")
        unborn.unlink(missing_ok=True)
        sock.bind(os.fspath(unborn))
        unborn.chmod(mode)
        unborn.rename(path)
    except OSError as error:
        sock.close()
        raise NotReady(f"the socket {path} can't be made ({error.strerror or error}): choose another path") from None
    except NotReady:
        sock.close()
        raise
    return sock


def _must_be_dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, suppress(ConnectionRefusedError):
        sock.connect(os.fspath(path))
        raise NotReady(f"another server listens on {path}: stop it, or choose another path")
