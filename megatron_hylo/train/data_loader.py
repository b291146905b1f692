"""What one rank trains on: its windows, its part of each of them, on its device, and what a stored teacher says of them."""

from collections.abc import Generator, Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_hylo.config.train import TrainConfig
from megatron_hylo.data.packed import batches
from megatron_hylo.data.prefetch import ahead
from megatron_hylo.data.windows import WindowSource
from megatron_hylo.parallel.context import sequence_shard, sequence_slice
from megatron_hylo.parallel.documents import PackedDocuments
from megatron_hylo.teachers.signal import TeacherSignal


def rank_batches(
    config: TrainConfig,
    dataset: WindowSource,
    consumed_samples: int,
    device: torch.device,
    signal: TeacherSignal | None = None,
) -> Generator[dict, None, None]:
    """Endless micro batches of this rank, from where `consumed_samples` windows of all ranks have been used; read ahead.

    Args:
        config, dataset, consumed_samples: of the run.
        device: where tensors are wanted.
        signal: a teacher that is not on these ranks, whose hidden states come along.

    Yields:
        {"input_ids", "labels"}: int64 [micro batch, sequence / context-parallel ranks], and with `packed_documents`
        [1, micro batch * sequence / ranks] and "documents"; with recall "answers", int32 of the same shape; with such a teacher "teacher_hidden"
        [sequence / ranks, micro batch, H].
    """
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = batches(dataset, consumed_samples, config.micro_batch_size, rank, ranks, config.packed_documents)
    if signal is not None:
        found = _own(signal.with_hidden(found, dataset), device)  # which reads ahead as far as it wants
    else:
        found = ahead(_own(found, device))
    for batch in found:
        starts, hidden = batch.pop("document_starts", None), batch.pop("teacher_hidden", None)
        local: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if starts is not None:
            length = config.micro_batch_size * config.sequence_length
            local["documents"] = PackedDocuments(starts.to(device), length, sequence_slice(length))
        if hidden is not None:
            local["teacher_hidden"] = hidden()
        yield local


def _own(found: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """This rank's part of each, in memory that a GPU reads while the CPU goes on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of the thread that reads ahead
    for batch in found:
        batch.pop("windows")
        for name in {"input_ids", "labels", "answers"} & batch.keys():
            own = sequence_shard(batch[name])
            batch[name] = own.pin_memory() if device.type == "cuda" else own
        yield batch
