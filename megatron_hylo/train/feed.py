"""What one rank trains on: its windows, its part of each of them, on its device."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_hylo.data.packed import PackedDataset, batches
from megatron_hylo.parallel.context import own_part, own_slice
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.train.config import TrainConfig


def rank_batches(config: TrainConfig, dataset: PackedDataset, consumed_samples: int, device: torch.device) -> Iterator[dict]:
    """Endless micro batches of this rank, from where `consumed_samples` windows of all ranks have been used.

    Yields:
        {"input_ids", "labels"}: int64 [micro batch, sequence / context-parallel ranks], and with `packed_documents`
        [1, micro batch * sequence / ranks] and "documents".
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    packed = config.packed_documents
    for batch in batches(dataset, consumed_samples, config.micro_batch_size, rank, ranks, packed):
        starts = batch.pop("document_starts", None)
        local: dict[str, Any] = {name: own_part(tensor).to(device) for name, tensor in batch.items()}
        if starts is not None:
            length = batch["input_ids"].shape[1]
            local["documents"] = PackedDocuments(starts.to(device), length, own_slice(length))
        yield local
