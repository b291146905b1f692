"""A vocabulary that tensor parallelism does not divide: each rank has as many rows of embedding and head, the last ones empty.

Rows after the vocabulary's are zero, no token is looked up in them, and no soft-max has them (distill/head_loss.py), so their
gradients are zero too and they stay what they are. They exist in memory alone: what is written is [vocabulary, hidden].
(Megatron-LM's `--make-vocab-size-divisible-by` writes them as well.)
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_hylo.config import ConfigError


def padded_vocabulary(vocabulary: int, ranks: int) -> int:
    """Rows of embedding and head that `ranks` tensor-parallel ranks have together: the next multiple of their number.

    Raises:
        ConfigError: so few tokens that a rank would have none.
    """
    share = -(-vocabulary // ranks)
    if (ranks - 1) * share >= vocabulary:
        raise ConfigError(
            f"tensor_model_parallel_size {ranks} leaves a rank without any of {vocabulary} tokens; use fewer ranks"
        )
    return ranks * share


def own_rows(rows: int, vocabulary: int) -> tuple[int, int]:
    """Global number of this rank's first row, and how many of its `rows` are not padding."""
    first = parallel_state.get_tensor_model_parallel_rank() * rows
    return first, min(rows, vocabulary - first)


@torch.no_grad()
def clear_padding(parameters: Iterable[Tensor], vocabulary: int) -> None:
    """Make the rows after the vocabulary's zero, in place, for norms that do not depend on the ranks.

    Args:
        parameters: this tensor-parallel rank's rows of embedding or head, or their gradients: [rows, hidden] each.
        vocabulary: tokens.
    """
    for parameter in parameters:
        parameter[own_rows(len(parameter), vocabulary)[1] :] = 0


def without_padding(sharded: ShardedTensor, vocabulary: int) -> ShardedTensor | ShardedTensorFactory:
    """Describe embedding or head (or its optimizer state) as stored: [vocabulary, hidden], whatever the ranks.

    Args:
        sharded: this rank's rows, as Megatron-Core describes them; unchanged where no rank has padding.
        vocabulary: tokens.
    """
    if sharded.global_shape[0] == vocabulary:
        return sharded
    padded, hidden = sharded.local_shape
    first, rows = own_rows(padded, vocabulary)

    def build(key: str, data: Tensor, replica: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        """Make the shard that is stored: this rank's rows of the vocabulary, without padding."""
        # shards of different sizes are no regular grid, hence no `axis_fragmentations`
        return [ShardedTensor(key, data[:rows], data.dtype, (rows, hidden), (vocabulary, hidden), (first, 0), None, replica)]

    def merge(stored: Any) -> Tensor:
        """Pad the stored rows with zeros to this rank's share."""
        return torch.nn.functional.pad(stored[0], (0, 0, 0, padded - rows))

    return ShardedTensorFactory(sharded.key, sharded.data, build, merge, sharded.replica_id)
