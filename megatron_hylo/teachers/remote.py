"""Student side of a teacher that runs in another job (`--teacher_address HOST:PORT`); server.py is the teacher's side.

Teacher and students are two torchrun worlds with a parallelism of their own each; no rank of the student holds the teacher, but
its head. Each data-parallel replica of the student has one link, from its leader: first tensor- and context-parallel rank of
the last pipeline stage. The leader asks for a micro-batch's hidden states before the one before it has come, so that the
teacher works while the student does; then every context-parallel rank gets its part, and tensor-parallel ranks the same.
"""

import functools
import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.data.prefetch import ahead
from megatron_hylo.data.windows import WindowSource
from megatron_hylo.distill.head_rows import head_part
from megatron_hylo.platform.distributed import device, rank
from megatron_hylo.teachers.addresses import replica_address
from megatron_hylo.teachers.remote_access import ADVICE, introduce, is_loopback, read_secret
from megatron_hylo.teachers.remote_link import (
    ERROR,
    HEAD,
    HIDDEN,
    IDS,
    STARTS,
    TEXT,
    GoneError,
    Link,
    NotTheProtocolError,
    Shape,
    as_text,
    is_text,
    shown,
)

ASKED = 2  # micro-batches under way besides the one that is trained on
DTYPES = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}
RETRY, MEETING = 0.5, 10.0  # seconds


class RemoteTeacher:
    """A `TeacherSignal` (signal.py) that a server answers.

    Args:
        address: "host:port" of `hylo serve-teacher`, or one for each copy of the teacher, parted by commas.
        dtype: what the head and the hidden states are wanted in.
        timeout: of meeting the server, and of every answer.

    Raises:
        ConfigError: nobody answers in time, or who answers is not the teacher or does not accept this student.
    """

    def __init__(self, address: str, dtype: torch.dtype, timeout: timedelta) -> None:
        self.dtype, self.device = dtype, device()
        self.cp, self.tp = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.leads = last and self.cp.rank() == 0 and self.tp.rank() == 0
        self.teacher: Connection | None = None
        if self.leads:
            number, links = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
            who = f"process {os.getpid()} of {socket.gethostname()}, rank {rank()}, replica {number} of {links}"
            self.teacher = Connection(address, number, who, timeout.total_seconds())
        self.about: dict[str, Any] | None = self.teacher.about if self.teacher else None  # what the server says; leaders know
        vocabulary, self.width, self.sent_as = self._agree()
        self.config = SimpleNamespace(sequence_parallel=False, hylo=SimpleNamespace(vocab_size=vocabulary))
        self.asked: deque = deque()  # micro-batches
        self.weight = self._head(vocabulary) if last else None

    def _agree(self) -> tuple[int, int, torch.dtype]:
        """Share the teacher's vocabulary, width and dtype, known to the leaders, with all ranks."""
        dtypes, about = list(DTYPES.values()), self.about
        known = [about["vocab_size"], about["hidden_size"], dtypes.index(DTYPES[about["dtype"]])] if about else [0, 0, 0]
        numbers = torch.tensor(known, device=self.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        vocabulary, width, index = numbers.tolist()
        return vocabulary, width, dtypes[index]

    def _head(self, vocabulary: int) -> Tensor:
        """Receive this rank's rows of the head; the leader receives all and scatters them."""
        if self.teacher is not None:
            whole = self.teacher.receive(HEAD, (vocabulary, self.width), self.sent_as).to(self.device)
        else:
            whole = torch.empty(vocabulary, self.width, dtype=self.sent_as, device=self.device)
        for group in (self.cp, self.tp):
            if group.size() > 1:
                dist.broadcast(whole, src=dist.get_process_group_ranks(group)[0], group=group)
        return head_part(whole, self.tp).to(self.dtype)

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the head, [vocab / TP rounded up, H]."""
        assert self.weight is not None, "only the last pipeline stage has the head"
        return self.weight

    def with_hidden(self, batches: Iterator[dict], dataset: WindowSource) -> Iterator[dict]:
        """Implement `TeacherSignal.with_hidden`."""
        for batch in ahead(self._answers(batches), 1) if self.leads else batches:
            hidden = batch.pop("hidden", None)
            yield batch | {"teacher_hidden": functools.partial(self._share, hidden, tuple(batch["input_ids"].shape))}

    def _answers(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Add "hidden" [sequence, micro batch, H] on the CPU to each batch; runs in its own thread."""
        assert self.teacher is not None  # on leaders only
        while self.asked:  # by an earlier iterator, which is over
            self._receive()
        for batch in batches:
            self.teacher.ask(batch["input_ids"], batch.get("document_starts"))
            self.asked.append(batch)
            if len(self.asked) > ASKED:
                yield self._receive()

    def _receive(self) -> dict:
        """Return the oldest requested micro-batch with its answer."""
        assert self.teacher is not None  # on leaders only
        windows, length = self.asked[0]["input_ids"].shape
        hidden = self.teacher.receive(HIDDEN, (length, windows, self.width), self.sent_as, pinned=self.device.type == "cuda")
        return self.asked.popleft() | {"hidden": hidden}

    def _share(self, hidden: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Scatter the leader's hidden states: this rank's [sequence / context-parallel ranks, micro batch, H]."""
        windows, length = shape
        part = torch.empty(length // self.cp.size(), windows, self.width, dtype=self.sent_as, device=self.device)
        if self.tp.rank() == 0:
            whole = None if hidden is None else hidden.to(self.device)  # leaders have it
            if self.cp.size() > 1:
                parts = None if whole is None else list(whole.chunk(self.cp.size()))
                dist.scatter(part, parts, src=dist.get_process_group_ranks(self.cp)[0], group=self.cp)
            else:
                assert whole is not None
                part = whole
        if self.tp.size() > 1:
            part = part.contiguous()
            dist.broadcast(part, src=dist.get_process_group_ranks(self.tp)[0], group=self.tp)
        return part.to(self.dtype)


class Connection:
    """A student's connection to one replica of the teacher; every failure is a ConfigError that names the teacher.

    Args:
        address: see `RemoteTeacher`.
        number: of the student's data-parallel replicas; they are spread over the copies of the teacher.
        who: what the teacher's log is to call this student.
        wait: seconds to wait for the teacher, now and at every answer.
    """

    def __init__(self, address: str, number: int, who: str, wait: float) -> None:
        self.wait, secret = wait, read_secret()
        self._connect(*replica_address(address, 0), secret)
        if copy := number % self.about["replicas"]:
            self.link.end()
            self._connect(*replica_address(address, copy), secret)
        try:
            self.link.send_text(TEXT, who)
        except GoneError as error:
            raise self._lost(error) from error

    def ask(self, ids: Tensor, starts: Tensor | None) -> None:
        """Request the hidden states of a micro-batch.

        Args:
            ids: int64 [windows, length], on the CPU.
            starts: int64 [documents], on the CPU: first tokens of packed documents; None without.

        Raises:
            ConfigError: the teacher is lost, or has refused and ended the connection.
        """
        try:
            self.link.send(IDS, ids)
            self.link.send(STARTS, torch.zeros(0, dtype=torch.int64) if starts is None else starts)
        except GoneError as error:
            self._said_last()
            raise self._lost(error) from error

    def receive(self, kind: int, shape: Shape, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """Receive the teacher's next message, which must be of the expected kind, dtype and shape.

        Args:
            kind, shape, dtype: of the message.
            pinned: receive into memory that a GPU reads fast.

        Raises:
            ConfigError: the teacher refuses, with its reason, sends another message, or is lost.
        """
        try:
            got, x = self.link.receive(lambda *message: message == (kind, shape, dtype) or _is_error(*message), pinned=pinned)
        except (GoneError, NotTheProtocolError) as error:
            raise self._lost(error) from error
        if got == ERROR:
            raise ConfigError(f"the teacher at {self.where} refuses: {as_text(x)}")
        return x

    def _said_last(self) -> None:
        """Raise the reason that the teacher gave before it ended the connection, if it gave one."""
        try:
            while True:
                kind, x = self.link.receive(lambda *_: True)
                if kind == ERROR:
                    raise ConfigError(f"the teacher at {self.where} refuses: {as_text(x)}")
        except (GoneError, NotTheProtocolError):
            pass

    def _lost(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"the teacher at {self.where} is lost: {error}; it was stopped or killed, or the network failed: look at the log "
            f"of `hylo serve-teacher`, start it again, and run the same command to resume"
        )

    def _connect(self, host: str, port: int, secret: bytes | None) -> None:
        """Connect to the teacher, which may still be starting."""
        self.where, end = shown((host, port)), time.monotonic() + self.wait
        while True:
            try:
                sock = socket.create_connection((host, port), timeout=max(end - time.monotonic(), RETRY))
                if secret is None and not is_loopback(sock.getpeername()[0]):
                    raise ConfigError(f"the teacher at {self.where} is on another machine, and there is no secret; {ADVICE}")
                self.link = Link(sock, self.wait)
                deadline = time.monotonic() + min(MEETING, self.wait)
                introduce(self.link, deadline, secret, self.where)
                _, about = self.link.receive_text(begin=deadline)
                self.about = self._checked(about)
                return
            except (OSError, NotTheProtocolError) as error:  # GoneError among them
                if time.monotonic() + RETRY > end:
                    raise ConfigError(
                        f"no teacher answers at {self.where} ({error}); start `hylo serve-teacher` first, and look at its host "
                        f"and port"
                    ) from error
                time.sleep(RETRY)

    def _checked(self, text: str) -> dict:
        try:
            about = json.loads(text)
            numbers = [about[name] for name in ("vocab_size", "hidden_size", "replicas")]
            if about["dtype"] in DTYPES and all(type(n) is int and 0 < n < 1 << 31 for n in numbers):
                return about
        except (ValueError, KeyError, TypeError):
            pass
        raise ConfigError(f"what answers at {self.where} does not describe itself as a teacher: {text[:80]!r}")


def _is_error(kind: int, shape: Shape, dtype: torch.dtype) -> bool:
    return kind == ERROR and is_text(shape, dtype)
