"""`hylo serve-teacher`: a frozen teacher that answers students of another torchrun world. remote_teacher.py is their side.

Each replica of the teacher (its tensor- and context-parallel ranks) serves every n-th link of a run of students, one request
of each link in turn: token ids come, last hidden states go, in chunks. When the students leave, it waits for the next run.
"""

import itertools
import json
import logging
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.data.tokenizer import read_vocabulary
from megatron_hylo.distill.head_loss import whole_head
from megatron_hylo.io.identity import content_identity
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.frozen import freeze
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.context import own_part, own_slice
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.platform.distributed import device, is_main, session
from megatron_hylo.teachers.remote import CHUNK
from megatron_hylo.teachers.remote_link import SERVER, Link, link_store, open_store

logger = logging.getLogger("megatron_hylo.distill")
POLL = timedelta(seconds=2)  # so often a waiting server looks, and can be stopped
PACKED, WHOLE, GONE = 1, 0, -1  # kinds of requests, as the ranks of a replica tell each other


def serve_teacher(
    teacher: str, address: str, parallel: ParallelConfig, dtype: torch.dtype, timeout: timedelta, runs: int | None = None
) -> None:
    """Answer students until `runs` runs of them are over.

    Args:
        teacher: model folder.
        address: "host:port" to listen at, as students will name it.
        parallel: of one replica; tensor (and sequence) and context parallelism.
        dtype: of weights, activations and what is sent.
        timeout: how long a student may be silent.
        runs: None: until interrupted.

    Raises:
        ConfigError: an address that cannot be had; pipeline stages.
    """
    if parallel.pipeline_model_parallel_size > 1:
        raise ConfigError("serve-teacher has no pipeline stages; use tensor and context parallelism, and more replicas")
    with session(parallel):
        (model,) = freeze([load_model(teacher, parallel, params_dtype=dtype)])
        vocabulary = read_vocabulary(teacher) if is_main() else None
        about = {"identity": content_identity(teacher), "vocabulary": vocabulary and vocabulary.identity}
        replica = Replica(model, address, dtype, timeout, about)
        for run in itertools.count() if runs is None else range(runs):
            replica.serve(run)


class Replica:
    """This rank's part of one copy of the teacher.

    Args:
        model: the teacher.
        address, dtype, timeout: see `serve_teacher`.
        about: told to students besides its sizes: identities of its content and of its vocabulary.
    """

    def __init__(
        self,
        model: HyloModel,
        address: str,
        dtype: torch.dtype,
        timeout: timedelta,
        about: dict[str, str | None] | None = None,
    ) -> None:
        self.model, self.dtype, self.timeout, self.device = model, dtype, timeout, device()
        self.cp, self.tp = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
        self.leads = self.cp.rank() == 0 and self.tp.rank() == 0
        self.number = parallel_state.get_data_parallel_rank()
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.store = None
        if is_main():
            self.store = open_store(address, True, timeout)
            c = model.config.hylo
            sizes = dict(vocab_size=c.vocab_size, hidden_size=c.hidden_size, dtype=str(dtype), replicas=self.replicas)
            self.store.set("teacher", json.dumps(sizes | (about or {})))
        dist.barrier()
        if self.leads and self.store is None:
            self.store = open_store(address, False, timeout)

    def serve(self, run: int) -> None:
        """One run of students, from their meeting to their leaving."""
        head = whole_head(self.model.head_weight(), self.model.config.hylo.vocab_size, self.tp)  # the leader sends it
        links = self._meet(run, head) if self.leads else {}
        answered, start = 0, time.perf_counter()
        while True:
            if not self.leads:
                if not self._answer(None, None):
                    return
                continue
            if not links:
                self._tell(GONE)
                logger.info("replica %d: students left after %d micro-batches, %.0f s", self.number, answered,
                            time.perf_counter() - start)  # fmt: skip
                return
            for number, link in list(links.items()):
                try:
                    answered += self._answer(link, link.receive((3,), torch.int64))
                except RuntimeError as error:  # gloo's: the other process is gone, or silent for too long
                    logger.info("link %d ended: %s", number, str(error).splitlines()[0][:100])
                    del links[number]

    def _meet(self, run: int, head: Tensor) -> dict[int, Link]:
        """Wait for students, and give each the head."""
        prefix = f"replica{self.number}/run"
        self.store.set(prefix, str(run))
        logger.info("replica %d waits for students", self.number)
        while not self.store.check([f"{prefix}{run}/links"]):
            time.sleep(POLL.total_seconds())
        count = int(self.store.get(f"{prefix}{run}/links"))
        links = {}
        try:
            for n in range(self.number, count, self.replicas):
                links[n] = Link(link_store(self.store, self.number, run, n), SERVER, self.timeout)
            for sending in [link.send(head) for link in links.values()]:
                sending.wait()
        except RuntimeError as error:  # gloo's: a student that announced itself did not come, or left
            logger.warning("students did not come: %s", str(error).splitlines()[0][:100])
            links = {}
        self.store.delete_key(prefix)  # busy: the next students wait
        logger.info("replica %d serves %d links", self.number, len(links))
        return links

    def _tell(self, kind: int, *sizes: int) -> Tensor:
        """The leader's request, known to all ranks of the replica: kind, windows, tokens, documents."""
        request = torch.tensor([kind, *sizes, *[0] * (3 - len(sizes))], device=self.device)
        return self._from_leader(request)

    def _from_leader(self, x: Tensor) -> Tensor:
        for group in (self.cp, self.tp):
            if group.size() > 1:
                dist.broadcast(x, src=dist.get_process_group_ranks(group)[0], group=group)
        return x

    def _answer(self, link: Link | None, header: Tensor | None) -> bool:
        """One micro-batch, on all ranks of the replica; False when there is none because the students are gone."""
        if link is not None:
            windows, length, count = header.tolist()
            ids = link.receive((windows, length), torch.int64)
            starts = link.receive((count,), torch.int64) if count >= 0 else torch.zeros(0, dtype=torch.int64)
            request = self._tell(WHOLE if count < 0 else PACKED, windows, length, max(count, 0))
        else:
            request = self._tell(GONE)
        kind, windows, length, count = request.tolist()
        if kind == GONE:
            return False
        if link is None:
            ids, starts = (torch.empty(shape, dtype=torch.int64) for shape in ((windows, length), (count,)))
        ids, documents = self._from_leader(ids.to(self.device)), None
        if kind == PACKED:
            documents = PackedDocuments(self._from_leader(starts.to(self.device)), length, own_slice(length))
        with torch.no_grad():
            hidden = self._whole(self.model(own_part(ids), documents))
        if link is not None:
            for sending in [link.send(hidden[at : at + CHUNK].to(self.dtype)) for at in range(0, length, CHUNK)]:
                sending.wait()
        return True

    def _whole(self, hidden: Tensor) -> Tensor:
        """All tokens of all ranks, [sequence, windows, H]."""
        if self.model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tp)
        if self.cp.size() == 1:
            return hidden
        whole = hidden.new_empty(self.cp.size() * len(hidden), *hidden.shape[1:])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.cp)
        return whole
