"""Access to a remote teacher: listening, the shared secret, and the handshake in which both sides prove that they have it.

The secret is in HYLO_TEACHER_SECRET, or in a file that HYLO_TEACHER_SECRET_FILE names; it never travels. Each side sends 32
random bytes and answers with HMAC-SHA256 of both sides' bytes, first the student, then the teacher. What follows is neither
encrypted nor signed (docs/security.md).
"""

import hmac
import ipaddress
import os
import secrets
import socket
import stat
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.teachers.remote_link import Link, NotTheProtocolError, shown

SECRET, SECRET_FILE, SHORTEST = "HYLO_TEACHER_SECRET", "HYLO_TEACHER_SECRET_FILE", 16
GREETING, NONCE, PROOF = b"HYLO-T2\n", 32, 32  # the greeting changes with the protocol
ADVICE = f"set {SECRET}, or {SECRET_FILE} to a file, to the same {SHORTEST} characters or more on both sides"


class RefusedError(ConfigError):
    """One side does not accept the other."""


def is_loopback(host: str) -> bool:
    """Whether an address, as a socket reports it, is reachable from this machine alone."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def read_secret() -> bytes | None:
    """Read the shared secret from this process's environment.

    Raises:
        ConfigError: it is too short, given twice, or in a file that is missing or that others may read.
    """
    secret, file = os.environ.get(SECRET), os.environ.get(SECRET_FILE)
    if secret is not None and file is not None:
        raise ConfigError(f"{SECRET} and {SECRET_FILE} are both set; set one of them")
    if file is not None:
        path = Path(file).expanduser()
        try:
            mode, secret = path.stat().st_mode, path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{SECRET_FILE} {file} cannot be read: {error}") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{SECRET_FILE} {file} may be read by others; chmod 600 {file}")
    if secret is None:
        return None
    if len(secret.encode()) < SHORTEST:
        raise ConfigError(
            f"the secret of {SECRET if file is None else file} is shorter than {SHORTEST} characters; {ADVICE}, e.g. of "
            f"`openssl rand -hex 32`"
        )
    return secret.encode()


def resolve(host: str, port: int, secret: bytes | None) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Resolve the one address to listen at.

    Raises:
        ConfigError: there is no such host, or it reaches beyond this machine and there is no secret.
    """
    try:
        family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise _unlistenable(host, port, error) from error
    address = str(found[0]), int(found[1])
    if secret is None and not is_loopback(address[0]):
        raise ConfigError(
            f"{shown(address)} can be reached from other machines, and there is no secret; {ADVICE}, or listen at "
            f"127.0.0.1:{port} (with an SSH tunnel from elsewhere)"
        )
    return family, address


def listen(host: str, port: int, secret: bytes | None) -> socket.socket:
    """Open a socket that listens at that address and no other.

    Raises:
        ConfigError: the address cannot be had; see `resolve`.
    """
    family, address = resolve(host, port, secret)
    try:
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise _unlistenable(host, port, error) from error


def _unlistenable(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen at {shown((host, port))} ({error}); choose a free port and an address of this machine")


def admit(link: Link, deadline: float, secret: bytes | None) -> None:
    """Teacher's side of the handshake, with a deadline in time.monotonic() seconds.

    Raises:
        NotTheProtocolError: the other side speaks something else.
        RefusedError: it has another secret.
    """
    if link.read(len(GREETING), deadline) != GREETING:
        raise NotTheProtocolError("it is no student of this version")
    theirs, mine = link.read(NONCE, deadline), secrets.token_bytes(NONCE)
    link.write(GREETING + bytes([secret is not None]) + mine, deadline)
    if secret is None:
        return
    right = hmac.compare_digest(link.read(PROOF, deadline), _proof(secret, b"student", theirs, mine))
    link.write(bytes([right]) + (_proof(secret, b"teacher", theirs, mine) if right else bytes(PROOF)), deadline)
    if not right:
        raise RefusedError("it has another secret")


def introduce(link: Link, deadline: float, secret: bytes | None, where: str) -> None:
    """Student's side of the handshake, in which both sides prove that they know the secret.

    Args:
        link: connection to the teacher.
        deadline: time of time.monotonic(), in seconds, by which the teacher must have answered.
        secret: this side's, or None.
        where: the teacher's address, for messages.

    Raises:
        RefusedError: what answers is no teacher, or one side has no secret or another one.
        GoneError: the teacher closed the connection, or did not answer in time.
    """
    mine = secrets.token_bytes(NONCE)
    link.write(GREETING + mine, deadline)
    if link.read(len(GREETING), deadline) != GREETING:
        raise RefusedError(f"what answers at {where} is no teacher of this version; look at its host and port")
    asks, theirs = link.read(1, deadline) == b"\x01", link.read(NONCE, deadline)
    if asks and secret is None:
        raise RefusedError(f"the teacher at {where} asks for a secret; {ADVICE}")
    if secret is not None and not asks:
        raise RefusedError(f"the teacher at {where} proves nothing, though a secret is set here; {ADVICE}")
    if secret is None:
        return
    link.write(_proof(secret, b"student", mine, theirs), deadline)
    accepted, proof = link.read(1, deadline) == b"\x01", link.read(PROOF, deadline)
    if not accepted:
        raise RefusedError(f"the teacher at {where} has another secret; {ADVICE}")
    if not hmac.compare_digest(proof, _proof(secret, b"teacher", mine, theirs)):
        raise RefusedError(f"what answers at {where} does not know the secret: it is not the teacher that was meant")


def _proof(secret: bytes, side: bytes, student: bytes, teacher: bytes) -> bytes:
    return hmac.digest(secret, GREETING + side + student + teacher, "sha256")
