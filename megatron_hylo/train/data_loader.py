"""Per-rank data loader: selects this rank's samples and sequence slice, and moves them to the device.

It also attaches the hidden states of a stored or remote teacher.
"""

import time
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


class TimedBatches(Iterator[dict[str, Any]]):
    """Micro-batches, with the time that they were waited for.

    Attributes:
        waited: seconds so far. On a GPU they need not delay a step: kernels that were launched before run on meanwhile.
    """

    def __init__(self, batches: Generator[dict[str, Any], None, None]) -> None:
        self.batches, self.waited = batches, 0.0

    def __next__(self) -> dict[str, Any]:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """End the thread that reads ahead."""
        self.batches.close()


def rank_batches(
    config: TrainConfig,
    dataset: WindowSource,
    consumed_samples: int,
    device: torch.device,
    signal: TeacherSignal | None = None,
) -> TimedBatches:
    """Return this rank's endless micro-batches, prefetched, after `consumed_samples` windows of all ranks.

    Args:
        config, dataset: settings and windows of the run.
        consumed_samples: position in the dataset.
        device: device of the tensors.
        signal: a stored or remote teacher, whose hidden states are attached.

    Returns:
        {"input_ids", "labels"}: int64 [micro batch, sequence / context-parallel ranks], and with `packed_documents`
        [1, micro batch * sequence / ranks] and "documents"; with recall "answers", int32 of the same shape, and where answers
        alone are learnt "loss_mask", bool; with such a teacher "teacher_hidden" [sequence / ranks, micro batch, H], and where a
        stored one did not read the recall exercises "taught", bool, True at the tokens that it read.
    """
    return TimedBatches(_rank_batches(config, dataset, consumed_samples, device, signal))


def _rank_batches(
    config: TrainConfig, dataset: WindowSource, consumed_samples: int, device: torch.device, signal: TeacherSignal | None
) -> Generator[dict, None, None]:
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = batches(dataset, consumed_samples, config.micro_batch_size, rank, ranks, config.packed_documents)
    if signal is not None:
        found = _rank_slices(signal.with_hidden(found, dataset), device)  # which reads ahead as far as it wants
    else:
        found = ahead(_rank_slices(found, device))
    for batch in found:
        starts: Any = batch.pop("document_starts", None)
        hidden: Any = batch.pop("teacher_hidden", None)
        local: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if starts is not None:
            length = config.micro_batch_size * config.sequence_length
            local["documents"] = PackedDocuments(starts.to(device), length, sequence_slice(length))
        if hidden is not None:
            local["teacher_hidden"] = hidden()
        yield local


def _rank_slices(found: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """Cut this rank's sequence slice out of each batch, in pinned memory where there is a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of the thread that reads ahead
    for batch in found:
        for name in {"windows", "source_places"} & batch.keys():
            del batch[name]
        for name in {"input_ids", "labels", "answers", "loss_mask", "taught"} & batch.keys():
            own = sequence_shard(batch[name])
            batch[name] = own.pin_memory() if device.type == "cuda" else own
        yield batch
