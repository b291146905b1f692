"""A teacher on other ranks, for `distil --teacher_address HOST:PORT`: the student's side. serve_teacher.py is the other.

Teacher and students are two torchrun worlds with parallel layouts of their own; no rank of the student holds the teacher, but
its head. Each data-parallel replica of the student has one link, from its leader: first tensor- and context-parallel rank of
the last pipeline stage. The leader asks for a micro-batch's hidden states before the one before it has come, so that the
teacher works while the student does; then every context-parallel rank gets its part, and tensor-parallel ranks the same.
"""

import functools
import json
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
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.prefetch import ahead
from megatron_hylo.distill.head_loss import head_part
from megatron_hylo.platform.distributed import device
from megatron_hylo.teachers.remote_link import STUDENT, Link, link_store, open_store

CHUNK = 4096  # tokens that travel at a time
ASKED = 2  # micro-batches under way besides the one that is trained on
DTYPES = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}


class RemoteTeacher:
    """A `TeacherSignal` (signal.py) from a server.

    Args:
        address: "host:port" of `hylo serve-teacher`.
        dtype: what the head and the hidden states are wanted in.
        timeout: of meeting the server, and of every answer.

    Raises:
        ConfigError: nobody answers, or the server is busy with other students.
    """

    def __init__(self, address: str, dtype: torch.dtype, timeout: timedelta) -> None:
        self.address, self.dtype, self.device = address, dtype, device()
        self.cp, self.tp = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.leads = last and self.cp.rank() == 0 and self.tp.rank() == 0
        store = open_store(address, False, timeout)
        about = json.loads(store.get("teacher"))
        self.about: dict[str, Any] = about  # what the server says of its teacher
        self.width, self.sent_as = about["hidden_size"], DTYPES[about["dtype"]]
        self.config = SimpleNamespace(sequence_parallel=False, hylo=SimpleNamespace(vocab_size=about["vocab_size"]))
        self.asked: deque = deque()  # (micro-batch, what is being sent)
        self.link = self._meet(store, about["replicas"], timeout) if self.leads else None
        self.weight = self._head(about["vocab_size"]) if last else None

    def _meet(self, store: dist.Store, replicas: int, timeout: timedelta) -> Link:
        mine, links = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        replica = mine % replicas
        run = int(store.get(f"replica{replica}/run"))  # waits while it is busy
        store.set(f"replica{replica}/run{run}/links", str(links))
        try:
            return Link(link_store(store, replica, run, mine), STUDENT, timeout)
        except RuntimeError as error:
            raise ConfigError(
                f"the teacher at {self.address} did not take this student in time ({str(error).splitlines()[0]}); it serves "
                f"one run at a time"
            ) from error

    def _head(self, vocabulary: int) -> Tensor:
        """This rank's rows; the leader gets all and hands them on."""
        if self.leads:
            whole = self.link.receive((vocabulary, self.width), self.sent_as).to(self.device)
        else:
            whole = torch.empty(vocabulary, self.width, dtype=self.sent_as, device=self.device)
        for group in (self.cp, self.tp):
            if group.size() > 1:
                dist.broadcast(whole, src=dist.get_process_group_ranks(group)[0], group=group)
        return head_part(whole, self.tp).to(self.dtype)

    def head_weight(self) -> Tensor:
        """[vocab / TP rounded up, H]."""
        return self.weight

    def with_hidden(self, batches: Iterator[dict], dataset: PackedDataset) -> Iterator[dict]:
        """See `TeacherSignal`."""
        for batch in ahead(self._answers(batches), 1) if self.leads else batches:
            hidden = batch.pop("hidden", None)
            yield batch | {"teacher_hidden": functools.partial(self._share, hidden, tuple(batch["input_ids"].shape))}

    def _answers(self, batches: Iterator[dict]) -> Iterator[dict]:
        """With "hidden" [sequence, micro batch, H] on the CPU; runs in a thread of its own."""
        while self.asked:  # by an earlier iterator, which is over
            self._receive()
        for batch in batches:
            self.asked.append((batch, self._ask(batch)))
            if len(self.asked) > ASKED:
                yield self._receive()

    def _receive(self) -> dict:
        """The oldest of the micro-batches asked for, answered."""
        asked, sendings = self.asked[0]
        windows, length = asked["input_ids"].shape
        sizes = [min(CHUNK, length - at) for at in range(0, length, CHUNK)]
        parts = [self.link.receive((size, windows, self.width), self.sent_as) for size in sizes]
        for sending in sendings:
            sending.wait()
        self.asked.popleft()
        return asked | {"hidden": torch.cat(parts)}

    def _ask(self, batch: dict) -> list:
        ids, starts = batch["input_ids"], batch.get("document_starts")
        header = torch.tensor([*ids.shape, -1 if starts is None else len(starts)])
        return [self.link.send(x) for x in (header, ids, *([] if starts is None else [starts]))]

    def _share(self, hidden: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """This rank's part of what the leader has: [sequence / context-parallel ranks, micro batch, H]."""
        windows, length = shape
        part = torch.empty(length // self.cp.size(), windows, self.width, dtype=self.sent_as, device=self.device)
        if self.tp.rank() == 0:
            if self.cp.size() > 1:
                parts = list(hidden.to(self.device).chunk(self.cp.size())) if self.leads else None
                dist.scatter(part, parts, src=dist.get_process_group_ranks(self.cp)[0], group=self.cp)
            else:
                part = hidden.to(self.device)
        if self.tp.size() > 1:
            part = part.contiguous()
            dist.broadcast(part, src=dist.get_process_group_ranks(self.tp)[0], group=self.tp)
        return part.to(self.dtype)
