"""What one rank trains on: its windows, its part of each of them, on its device, and what a stored teacher says of them."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_hylo.data.packed import PackedDataset, batches
from megatron_hylo.distill.teacher_store import StoredTeacher
from megatron_hylo.parallel.context import own_part, own_slice
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.train.config import TrainConfig

AHEAD = 4  # micro-batches that are read before they are asked for


def rank_batches(
    config: TrainConfig,
    dataset: PackedDataset,
    consumed_samples: int,
    device: torch.device,
    stored: StoredTeacher | None = None,
) -> Iterator[dict]:
    """Endless micro batches of this rank, from where `consumed_samples` windows of all ranks have been used.

    Args:
        config, dataset, consumed_samples: of the run.
        device: where tensors are wanted.
        stored: a teacher whose hidden states come along.

    Yields:
        {"input_ids", "labels"}: int64 [micro batch, sequence / context-parallel ranks], and with `packed_documents`
        [1, micro batch * sequence / ranks] and "documents"; with a stored teacher "teacher_hidden"
        [sequence / ranks, micro batch, H].
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    packed = config.packed_documents
    found = batches(dataset, consumed_samples, config.micro_batch_size, rank, ranks, packed)
    if stored is not None:
        found = ahead(_with_codes(found, dataset, stored))
    for batch in found:
        batch.pop("windows")
        starts, codes = batch.pop("document_starts", None), batch.pop("codes", None)
        local: dict[str, Any] = {name: own_part(tensor).to(device) for name, tensor in batch.items()}
        if starts is not None:
            length = batch["input_ids"].shape[1]
            local["documents"] = PackedDocuments(starts.to(device), length, own_slice(length))
        if codes is not None:
            codes = codes.reshape(*batch["input_ids"].shape, -1)
            local["teacher_hidden"] = stored.hidden(own_part(codes)).transpose(0, 1).contiguous()
        yield local


def _with_codes(found: Iterator[dict], dataset: PackedDataset, stored: StoredTeacher) -> Iterator[dict]:
    """With "codes" int16 [windows, sequence, H] of all input tokens, as the store has them."""
    for batch in found:
        rows = []
        for window in batch["windows"].tolist():
            pieces = dataset.pieces(window)
            document, first, count = pieces[-1]
            pieces[-1] = (document, first, count - 1)  # the last token is a label alone
            rows.append(np.concatenate([stored.store.read(*piece) for piece in pieces if piece[2]]))
        yield batch | {"codes": torch.from_numpy(np.stack(rows))}


def ahead(items: Iterator[Any], count: int = AHEAD) -> Iterator[Any]:
    """The same items, made in a thread before they are asked for; an error is raised where its item would be."""
    ready: queue.Queue = queue.Queue(maxsize=count)
    stop = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:
            put((None, error))

    threading.Thread(target=make, name="feed", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
