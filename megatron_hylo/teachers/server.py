"""`hylo serve-teacher`: a frozen teacher that answers students of another torchrun job; remote.py is the student's side.

Each copy of the teacher (its tensor- and context-parallel ranks) has an address of its own, at which its leading rank lets
students in (remote_listener.py). One request after another is told to all ranks of the copy and computed by them: token ids
come, last hidden states go.
"""

import logging
import signal
import time
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hylo.config import ConfigError, ParallelConfig, TeacherWindow
from megatron_hylo.config.teacher_window import OWN_WINDOW, yarn_origin
from megatron_hylo.data.tokenizer import read_vocabulary
from megatron_hylo.distill.head_rows import whole_head
from megatron_hylo.io import on_main
from megatron_hylo.io.identity import content_identity, json_identity
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.description import read_description
from megatron_hylo.models.frozen import FrozenModel, freeze
from megatron_hylo.parallel.context import sequence_shard, sequence_slice
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.platform.distributed import device, session
from megatron_hylo.teachers.addresses import replica_address
from megatron_hylo.teachers.remote_access import read_secret, resolve
from megatron_hylo.teachers.remote_listener import Limits, Listener

logger = logging.getLogger("megatron_hylo.distill")
POLL, TURN = (
    1.0,
    20.0,
)  # seconds: so often an idle leader looks whether it is to stop, and tells the other ranks that it is there
PACKED, WHOLE, IDLE, STOP = range(4)  # what the leader tells the other ranks of its copy
MAX_TOKENS = 1 << 20


def serve_teacher(
    teacher: str,
    address: str,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    timeout: timedelta,
    runs: int | None = None,
    max_tokens: int = MAX_TOKENS,
    teacher_window: TeacherWindow | None = None,
) -> None:
    """Answer students until `runs` runs of them are over, or Ctrl-C.

    Args:
        teacher: model folder.
        address: to listen at; see `replica_address`.
        parallel: of one copy; tensor (and sequence) and context parallelism.
        dtype: of weights, activations and what is sent.
        timeout: how long a student may be silent.
        runs: None: until interrupted.
        max_tokens: of a micro-batch.
        teacher_window: how the teacher reads sequences longer than its window; part of the identity that students are told.

    Raises:
        ConfigError: an address that cannot be had, or would need a secret; pipeline stages.
    """
    if parallel.pipeline_model_parallel_size > 1:
        raise ConfigError("serve-teacher has no pipeline stages; use tensor and context parallelism, and more copies")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if timeout <= timedelta(0) or runs is not None and runs < 1:
        raise ConfigError(
            f"--timeout_minutes must be above 0 and --runs at least 1, got {timeout.total_seconds() / 60:g} and {runs}"
        )
    resolve(*replica_address(address, 0), read_secret())  # before weights are read
    with session(parallel):
        ways, architecture = teacher_window or OWN_WINDOW, read_description(teacher)[0]
        if ways.is_derived:
            raise ConfigError(
                f"a server is not told how long sequences will be: give teacher_window.rope_scaling too, YaRN with factor = "
                f"longest sequence / {yarn_origin(architecture)} and original_max_position_embeddings "
                f"{yarn_origin(architecture)}"
            )
        window = ways.window(architecture, max_tokens)
        if window is not None:  # each rank reads windows of its own
            parallel = replace(parallel, context_parallel_size=1)
        model = freeze([load_model(teacher, parallel, params_dtype=dtype, **ways.changes())], window=window)
        vocabulary = on_main(lambda: read_vocabulary(teacher))
        identity, reach = content_identity(teacher), ways.reach(architecture)
        if ways.mode != "none":
            identity = json_identity([identity, asdict(ways)])
        about = {"identity": identity, "vocabulary": vocabulary.identity if vocabulary else None, "reach": reach}
        Replica(model, address, dtype, timeout, max_tokens, about).serve(runs)


class Replica:
    """This rank's part of one replica of the teacher.

    Args:
        model: the teacher.
        address, dtype, timeout, max_tokens: see `serve_teacher`.
        told: to students besides the teacher's sizes: identities of its content and of its vocabulary, and its reach (tokens of
            the longest sequence).
    """

    def __init__(
        self,
        model: FrozenModel,
        address: str,
        dtype: torch.dtype,
        timeout: timedelta,
        max_tokens: int = MAX_TOKENS,
        told: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device()
        self.cp, self.tp = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
        self.leads = self.cp.rank() == 0 and self.tp.rank() == 0
        self.number, self.stopped = parallel_state.get_data_parallel_rank(), False
        head = whole_head(model.head_weight(), model.config.hylo.vocab_size, self.tp)
        self.listener: Listener | None = None
        if self.leads:
            copies, c = parallel_state.get_data_parallel_world_size(), model.config.hylo
            about = dict(vocab_size=c.vocab_size, hidden_size=c.hidden_size, dtype=str(dtype), replicas=copies, **told or {})
            multiple = self.cp.size() * (self.tp.size() if model.config.sequence_parallel else 1)
            self.listener = Listener(
                replica_address(address, self.number), read_secret(), about, head.to(dtype).cpu(),
                Limits(c.vocab_size, max_tokens, multiple, about.get("reach")), timeout.total_seconds(),
            )  # fmt: skip

    def serve(self, runs: int | None = None) -> None:
        """Answer requests until `runs` times all students have left, or, for None, until interrupted."""
        former = signal.signal(signal.SIGINT, self._interrupted)
        try:
            while self._lead(runs) if self.leads else self._follow():
                pass
        finally:
            signal.signal(signal.SIGINT, former)
            if self.listener is not None:
                self.listener.close()

    def _interrupted(self, *_: Any) -> None:
        """Stop the leader between two requests; it tells the other ranks."""
        self.stopped = True

    def _lead(self, runs: int | None) -> bool:
        """Answer one request, or none in this turn; False when serving is over."""
        assert self.listener is not None  # on leaders only
        turn = time.monotonic() + TURN
        request = None
        while request is None and time.monotonic() < turn:
            if self.stopped or runs is not None and self.listener.runs >= runs:
                self._tell(STOP)
                logger.info("copy %d of the teacher stops", self.number)
                return False
            request = self.listener.next(POLL)
        if request is None:
            self._tell(IDLE)
            return True
        self._tell(
            WHOLE if request.starts is None else PACKED,
            *request.ids.shape,
            0 if request.starts is None else len(request.starts),
        )
        hidden = self._hidden(request.ids, request.starts)
        host = torch.empty(hidden.shape, dtype=self.dtype, pin_memory=hidden.is_cuda)
        request.student.answer(host.copy_(hidden))
        return True

    def _follow(self) -> bool:
        """Follow the leader's command; False when serving is over."""
        kind, windows, length, count = self._tell(IDLE).tolist()
        if kind in (PACKED, WHOLE):
            ids, starts = (torch.empty(shape, dtype=torch.int64) for shape in ((windows, length), (count,)))
            self._hidden(ids, starts if kind == PACKED else None)
        return kind != STOP

    def _tell(self, kind: int, *sizes: int) -> Tensor:
        """Broadcast the leader's command to all ranks of the replica: kind, windows, tokens, documents."""
        return self._from_leader(torch.tensor([kind, *sizes, *[0] * (3 - len(sizes))], device=self.device))

    def _from_leader(self, x: Tensor) -> Tensor:
        for group in (self.cp, self.tp):
            if group.size() > 1:
                dist.broadcast(x, src=dist.get_process_group_ranks(group)[0], group=group)
        return x

    def _hidden(self, ids: Tensor, starts: Tensor | None) -> Tensor:
        """Compute the last hidden states of the leader's request on all ranks of the replica: [length, windows, H]."""
        length, documents = ids.shape[1], None
        ids = self._from_leader(ids.to(self.device))
        if starts is not None:
            documents = PackedDocuments(self._from_leader(starts.to(self.device)), length, sequence_slice(length))
        return self._whole(self.model(sequence_shard(ids), documents))

    def _whole(self, hidden: Tensor) -> Tensor:
        """Gather all tokens of all ranks, [sequence, windows, H]."""
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tp)
        if self.cp.size() == 1:
            return hidden
        whole = hidden.new_empty(self.cp.size() * len(hidden), *hidden.shape[1:])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.cp)
        return whole
