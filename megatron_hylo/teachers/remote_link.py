"""One TCP connection between a teacher and a student: tensors as raw bytes, each behind a header of fixed length.

Nothing is unpickled. A receiver says what it expects, and allocates only after the header was found to be that.
"""

import select
import socket
import struct
import time
from collections.abc import Callable

import torch
from torch import Tensor

TEXT, ERROR, IDS, STARTS, HIDDEN, HEAD = range(1, 7)  # kinds of messages
DTYPES = (torch.uint8, torch.int64, torch.float32, torch.bfloat16)
HEADER = struct.Struct("<4sBBH3IQ")  # mark, kind, dtype, dimensions, sizes, bytes
MARK, MOST_TEXT = b"HYLO", 4096
PIECE = 4 << 20  # bytes handed to the kernel at a time
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # a machine that lost power is noticed in 90 s

Shape = tuple[int, ...]


class GoneError(ConnectionError):
    """The other side closed the connection, or was silent or stopped for too long."""


class NotTheProtocolError(ValueError):
    """The received message is not one that the protocol allows there."""


class Link:
    """Sends and receives messages; one thread may send while another receives.

    Args:
        sock: connected.
        wait: seconds after which a side that neither sends nor takes a byte counts as gone.
    """

    def __init__(self, sock: socket.socket, wait: float) -> None:
        self.sock, self.wait = sock, wait
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.peer = shown(sock.getpeername())

    def send(self, kind: int, x: Tensor) -> None:
        """Send a CPU tensor of at most three dimensions and a dtype of DTYPES; returns when the kernel has all of it.

        Raises:
            GoneError: the connection broke, or the other side takes nothing.
            ValueError: more dimensions, or another dtype.
        """
        if x.dim() > 3 or x.dtype not in DTYPES:
            sent = f"{x.dtype} of {x.dim()} dimensions"
            raise ValueError(f"cannot send {sent}: it must be of at most 3, and one of {', '.join(map(str, DTYPES))}")
        x = x.detach().contiguous()
        sizes = (*x.shape, 0, 0, 0)[:3]
        data = memoryview(x.view(-1).view(torch.uint8).numpy())
        self.write(HEADER.pack(MARK, kind, DTYPES.index(x.dtype), x.dim(), *sizes, len(data)))
        self.write(data)

    def send_text(self, kind: int, text: str) -> None:
        """Send a text, truncated to the allowed length."""
        self.send(kind, torch.frombuffer(bytearray(text.encode()[:MOST_TEXT] or b" "), dtype=torch.uint8))

    def receive(
        self,
        expected: Callable[[int, Shape, torch.dtype], bool],
        within: float | None = None,
        begin: float | None = None,
        pinned: bool = False,
    ) -> tuple[int, Tensor]:
        """Receive the next message: its kind and its tensor.

        Args:
            expected: (kind, shape, dtype) -> whether such a message may come now.
            within: seconds, from its first byte, in which a message must be whole; None: as long as bytes come.
            begin: time of time.monotonic() by which its first byte must be there.
            pinned: receive into memory that a GPU reads fast.

        Raises:
            NotTheProtocolError: something else came.
            GoneError: nothing came.
        """
        head = self.read(1, begin)
        deadline = None if within is None else time.monotonic() + within
        mark, kind, number, dimensions, *sizes, count = HEADER.unpack(head + self.read(HEADER.size - 1, deadline))
        if mark != MARK or number >= len(DTYPES) or dimensions > 3 or any(sizes[dimensions:]):
            raise NotTheProtocolError("it sent no message of this protocol")
        shape, dtype = tuple(sizes[:dimensions]), DTYPES[number]
        if not expected(kind, shape, dtype):
            raise NotTheProtocolError(f"it sent message {kind} of {dtype} {list(shape)}, which may not come here")
        if count != torch.Size(shape).numel() * dtype.itemsize:
            raise NotTheProtocolError(f"it sent {count} bytes for {dtype} {list(shape)}")
        x = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        self._fill(memoryview(x.view(-1).view(torch.uint8).numpy()), deadline)
        return kind, x

    def receive_text(self, within: float | None = None, begin: float | None = None) -> tuple[int, str]:
        """Receive the next message, which must be TEXT or ERROR; see `receive`."""
        kind, x = self.receive(lambda kind, shape, dtype: kind in (TEXT, ERROR) and is_text(shape, dtype), within, begin)
        return kind, as_text(x)

    def read(self, count: int, deadline: float | None = None) -> bytes:
        """Read exactly that many bytes before a deadline in time.monotonic() seconds; None: as long as any come.

        Raises:
            GoneError: the connection broke or was closed, or the bytes did not come in time.
        """
        data = bytearray(count)
        self._fill(memoryview(data), deadline)
        return bytes(data)

    def write(self, data: bytes | memoryview, deadline: float | None = None) -> None:
        """Write all of the bytes before a deadline in time.monotonic() seconds; None: as long as the other side takes any.

        Raises:
            GoneError: the connection broke, or the other side takes nothing, or the deadline has passed.
        """
        view, at = memoryview(data), 0
        while at < len(view):
            try:
                at += self.sock.send(view[at : at + PIECE])
            except BlockingIOError:
                self._await(select.POLLOUT, deadline)
            except OSError as error:
                raise GoneError(_reason(error)) from error

    def _fill(self, view: memoryview, deadline: float | None) -> None:
        at = 0
        while at < len(view):
            try:
                got = self.sock.recv_into(view[at : at + PIECE])
            except BlockingIOError:
                self._await(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise GoneError(_reason(error)) from error
            if not got:
                raise GoneError("it closed the connection in the middle of a message" if at else "it closed the connection")
            at += got

    def _await(self, event: int, deadline: float | None) -> None:
        seconds = self.wait if deadline is None else min(self.wait, deadline - time.monotonic())
        poll = select.poll()
        poll.register(self.sock, event)
        if not poll.poll(max(seconds, 0) * 1000):
            late = "its message took too long" if deadline is not None else f"it was silent for {self.wait:.0f} s"
            raise GoneError(late)

    def drain(self, seconds: float) -> None:
        """Send nothing more, and drop what still comes, for so many seconds.

        Closing at once would take from the other side what it has not read yet.
        """
        deadline = time.monotonic() + seconds
        try:
            self.sock.shutdown(socket.SHUT_WR)
            while True:
                self.read(1, deadline)
        except (OSError, GoneError):
            pass

    def end(self) -> None:
        """Shut down both directions; a thread that waits on the connection is woken with an error."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already


def is_text(shape: Shape, dtype: torch.dtype) -> bool:
    """Whether a header announces a text of allowed length."""
    return dtype == torch.uint8 and len(shape) == 1 and shape[0] <= MOST_TEXT


def as_text(x: Tensor) -> str:
    """Text of the other side, uint8 [bytes] of UTF-8, without characters that would disturb a terminal or a log."""
    text = x.numpy().tobytes().decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text)


def _reason(error: OSError) -> str:
    return f"the connection broke ({error.strerror or error})"


def shown(address: tuple) -> str:
    """Format a socket address as host:port."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
