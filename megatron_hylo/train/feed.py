"""What one rank trains on: its windows, its part of each of them, on its device, and what a stored teacher says of them."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_hylo.data.packed import PackedDataset, batches
from megatron_hylo.distill.signal import TeacherSignal
from megatron_hylo.parallel.context import own_part, own_slice
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.train.config import TrainConfig


def rank_batches(
    config: TrainConfig,
    dataset: PackedDataset,
    consumed_samples: int,
    device: torch.device,
    signal: TeacherSignal | None = None,
) -> Iterator[dict]:
    """Endless micro batches of this rank, from where `consumed_samples` windows of all ranks have been used.

    Args:
        config, dataset, consumed_samples: of the run.
        device: where tensors are wanted.
        signal: a teacher that is not on these ranks, whose hidden states come along.

    Yields:
        {"input_ids", "labels"}: int64 [micro batch, sequence / context-parallel ranks], and with `packed_documents`
        [1, micro batch * sequence / ranks] and "documents"; with such a teacher "teacher_hidden"
        [sequence / ranks, micro batch, H].
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    packed = config.packed_documents
    found = batches(dataset, consumed_samples, config.micro_batch_size, rank, ranks, packed)
    if signal is not None:
        found = signal.with_hidden(found, dataset)
    for batch in found:
        batch.pop("windows")
        starts, hidden = batch.pop("document_starts", None), batch.pop("teacher_hidden", None)
        local: dict[str, Any] = {name: own_part(tensor).to(device) for name, tensor in batch.items()}
        if starts is not None:
            length = batch["input_ids"].shape[1]
            local["documents"] = PackedDocuments(starts.to(device), length, own_slice(length))
        if hidden is not None:
            local["teacher_hidden"] = hidden()
        yield local
