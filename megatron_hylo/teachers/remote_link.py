"""Two processes of different torchrun worlds: one rank of a teacher's, one of a student's. Tensors over TCP, by gloo."""

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from megatron_hylo.config import ConfigError

SERVER, STUDENT = 0, 1  # ranks of a link


class Link:
    """Sends and receives CPU tensors whose shapes both sides know.

    Args:
        store: that both sides reach; a prefix of its own for each link.
        side: SERVER or STUDENT.
        timeout: of every operation, the first meeting included.
    """

    def __init__(self, store: Store, side: int, timeout: timedelta) -> None:
        self.other, self.group = 1 - side, ProcessGroupGloo(store, side, 2, timeout)

    def send(self, x: Tensor) -> "Sending":
        """Begin to send; `wait()` of the result returns when the other side has it."""
        data = x.detach().contiguous().cpu().view(torch.uint8)
        return Sending(self.group.send([data], self.other, 0), data)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Wait for a tensor."""
        x = torch.empty(shape, dtype=dtype)
        self.group.recv([x.view(torch.uint8)], self.other, 0).wait()
        return x


class Sending:
    """A tensor on its way; kept alive until it is there."""

    def __init__(self, work, data: Tensor) -> None:
        self.work, self.data = work, data

    def wait(self) -> None:
        """Until the other side has it."""
        self.work.wait()


def open_store(address: str, master: bool, timeout: timedelta) -> TCPStore:
    """The store at "host:port", hosted here or elsewhere.

    Raises:
        ConfigError: no such address, the port is taken, or nobody answers there in time.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"teacher address {address!r} must be HOST:PORT, e.g. node7:29600")
    try:
        return TCPStore(host, int(port), is_master=master, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        what = f"cannot listen at {address}" if master else f"no teacher answers at {address}"
        advice = "choose another port" if master else "start `hylo serve-teacher` first, and look at its host and port"
        raise ConfigError(f"{what} ({str(error).splitlines()[0]}); {advice}") from error


def link_store(store: Store, replica: int, run: int, link: int) -> PrefixStore:
    """Where one link of one run of students meets."""
    return PrefixStore(f"replica{replica}/run{run}/link{link}/", store)
