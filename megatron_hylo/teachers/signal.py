"""What training asks of a teacher that is not on its ranks: on disk (teacher_store.py), or on others (remote_teacher.py)."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from megatron_hylo.data.packed import PackedDataset


class TeacherSignal(Protocol):
    """Last hidden states for the head loss, and the head. A model of the same ranks is used as it is."""

    config: Any  # config.hylo.vocab_size; config.sequence_parallel is False: every tensor-parallel rank has all tokens

    def head_weight(self) -> Tensor:
        """This rank's rows of the head, [vocab / TP rounded up, H]; rows after the vocabulary's are padding."""

    def with_hidden(self, batches: Iterator[dict], dataset: PackedDataset) -> Iterator[dict]:
        """The same micro-batches of whole sequences, each with "teacher_hidden": a function that all ranks of a replica call,
        which returns what this rank needs, [sequence / context-parallel ranks, micro batch, H] on its device."""
