"""Context parallelism: rank r of n has the r-th of n equal, contiguous parts of every sequence.

Layers move what is small. Attention and MLA gather keys and values, MLA as its latent and rotary key; a convolution
gathers the last inputs of each part; a linear layer gathers what each part does to the recurrent state, whose size does
not depend on the sequence. Linear recurrences are affine in the state: a part turns S into A S + B, with A one number a
head in Mamba2 and a [dk, dk] matrix a head in Gated DeltaNet, so every rank finds B (and A) from its own tokens, all at
once, and composes those of the ranks before it.

One collective does it all, an all-gather whose backward is a reduce-scatter, and every rank takes part in it whether it
reads the result or not: a rank whose graph lacked one would leave the others waiting in the backward pass.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hylo.config import ConfigError


def own_slice(length: int) -> slice:
    """Places of this rank's tokens in a sequence of `length`.

    Raises:
        ConfigError: the context-parallel ranks do not divide the sequence.
    """
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if length % ranks:
        raise ConfigError(f"context_parallel_size {ranks} does not divide a sequence of {length} tokens")
    return slice(rank * length // ranks, (rank + 1) * length // ranks)


def own_part(x: Tensor) -> Tensor:
    """This rank's part of whole sequences: [batch, sequence] -> [batch, sequence / context-parallel ranks]."""
    return x[:, own_slice(x.shape[1])].contiguous()


class ContextGroup:
    """The ranks that share a sequence, as the mixers see them.

    `received_bytes` counts what this rank got from the others in forward passes (docs/parallelism.md has the formulas).

    Args:
        group: context-parallel process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.received_bytes = 0

    def positions(self, length: int) -> slice:
        """Places in the whole sequence of this rank's `length` tokens."""
        return slice(self.rank * length, (self.rank + 1) * length)

    def up_to_here(self, x: Tensor) -> Tensor:
        """This part and all before it: [sequence, batch, ...] of each rank -> [(rank + 1) sequence, batch, ...]."""
        if self.size == 1:
            return x
        return self._gather(x)[: (self.rank + 1) * len(x)]

    def tokens_before(self, x: Tensor, count: int) -> Tensor | None:
        """The inputs a causal convolution needs from the part before.

        Args:
            x: [batch, sequence, channels], sequence >= count.
            count: how many.

        Returns:
            [batch, channels, count], oldest first, zeros on the first rank; None with one rank.
        """
        if self.size == 1:
            return None
        if x.shape[1] < count:
            raise ConfigError(
                f"{x.shape[1]} tokens on each of {self.size} context-parallel ranks are fewer than the {count} that a "
                f"convolution looks back; use fewer ranks or longer sequences"
            )
        return self._before(x[:, -count:].movedim(1, -1), lambda state, ends: ends)

    def state_before(self, part: Callable[[], tuple[Tensor, Tensor]]) -> Tensor | None:
        """The recurrent state that this part of the sequence begins with.

        Args:
            part: gives A and B of this rank's tokens: B [batch, heads, rows, columns], and A [batch, heads, rows, rows]
                to multiply states with from the left, or [batch, heads, 1, 1].

        Returns:
            Like B; None with one rank.
        """
        if self.size == 1:
            return None
        a, b = part()
        width = a.shape[-1]

        def compose(state: Tensor, ab: Tensor) -> Tensor:
            a, b = ab.split([width, ab.shape[-1] - width], -1)
            return (a @ state if width > 1 else a * state) + b

        return self._before(torch.cat([a.expand(*b.shape[:-1], width), b], -1), compose, b.shape)

    def _before(self, x: Tensor, compose: Callable[[Tensor, Tensor], Tensor], shape: torch.Size | None = None) -> Tensor:
        """What `compose` makes of the tensors of all ranks before this one, from zeros; in the graph of every rank."""
        everyone = self._gather(x.unsqueeze(0))
        states = [x.new_zeros(shape or x.shape)]
        for theirs in everyone[:-1]:
            states.append(compose(states[-1], theirs))
        return torch.stack(states)[self.rank]

    def _gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each rank -> [ranks n, ...]; gradients are summed back."""
        self.received_bytes += (self.size - 1) * x.numel() * x.element_size()
        return gather_from_sequence_parallel_region(x.contiguous(), group=self.group)
