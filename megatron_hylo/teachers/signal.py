"""Interface of a teacher that is not on the training ranks: on disk (store.py), or in another job (remote.py)."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from megatron_hylo.data.windows import WindowSource


class TeacherSignal(Protocol):
    """Supplies last hidden states and the head for the head loss. A model on the same ranks is used directly instead."""

    config: Any  # config.hylo.vocab_size; config.sequence_parallel is False: every tensor-parallel rank has all tokens

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the head, [vocab / TP rounded up, H]; rows after the vocabulary's are padding."""

    def with_hidden(self, batches: Iterator[dict], dataset: WindowSource) -> Iterator[dict]:
        """Yield the same micro-batches, each with "teacher_hidden", a function that all ranks of a replica call.

        It returns this rank's part of the hidden states, [sequence / context-parallel ranks, micro batch, H] on its device.
        """
