"""Rows of two output heads, student's and teacher's, that stand for the same tokens, over ranks that share the vocabulary."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.padded_vocabulary import padded_vocabulary

PADDING = 0.01  # of a vocabulary: what two models of one tokenizer may differ by


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Refuse a teacher of another tokenizer. Two models of one may differ by rows that pad their heads, as Qwen2.5's do.

    Args:
        student, teacher: with `config.hylo.vocab_size`.

    Raises:
        ConfigError: sizes differ by more than padding.
    """
    ours, theirs = (model.config.hylo.vocab_size for model in (student, teacher))
    if abs(ours - theirs) > PADDING * max(ours, theirs):
        raise ConfigError(f"vocabulary differs: student {ours}, teacher {theirs}; use a teacher of the same tokenizer")


def teacher_rows(student: HyloModel, teacher: Any, group: dist.ProcessGroup) -> Tensor:
    """Return the rows of the teacher's head for the tokens of this rank's rows of the student's: [at most V / TP, H_t].

    Where the vocabularies differ in size, ranks have different tokens of them; then the whole head is gathered.

    Raises:
        ConfigError: see `check_vocabularies`.
    """
    ours, theirs = student.config.hylo.vocab_size, teacher.config.hylo.vocab_size
    if ours == theirs:
        return teacher.head_weight()
    check_vocabularies(student, teacher)
    share = len(student.head_weight())
    return whole_head(teacher.head_weight(), theirs, group)[group.rank() * share : (group.rank() + 1) * share]


def whole_head(weight: Tensor, vocabulary: int, group: dist.ProcessGroup) -> Tensor:
    """Gather all rows of a head that is divided over the ranks of `group`, without gradient and without padding.

    Args:
        weight: this rank's rows, [V / TP, H].
        vocabulary: V; what the ranks have beyond it is padding.
        group: ranks that share the vocabulary.

    Returns:
        [V, H].
    """
    weight = weight.detach().contiguous()
    whole = weight.new_empty(group.size() * len(weight), weight.shape[1])
    dist.all_gather(list(whole.chunk(group.size())), weight, group=group)
    return whole[:vocabulary]


def head_part(head: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Cut this rank's rows out of a whole head, padded as a model's are: [V, H] -> [V / TP rounded up, H]."""
    share = padded_vocabulary(len(head), group.size()) // group.size()
    mine = head[group.rank() * share : (group.rank() + 1) * share]
    return torch.nn.functional.pad(mine, (0, 0, 0, share - len(mine)))


def rows_to_use(weight: Tensor, teacher_weight: Tensor | None, first: int, vocabulary: int) -> int:
    """Number of this rank's rows that are not padding of either head.

    Args:
        weight: this rank's rows of the student's head, [rows, hidden].
        teacher_weight: the teacher's, likewise, or None.
        first: number of the first one in the whole head.
        vocabulary: tokens.
    """
    rows = min(len(weight), max(vocabulary - first, 0))
    return min(rows, len(teacher_weight)) if teacher_weight is not None else rows
