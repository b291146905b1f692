"""Micro-batches shared out over ranks, and sums over them whose bits do not depend on the number of ranks.

Micro-batches fall into GROUPS groups; a rank has whole groups. A sum is taken within each group first, then over the groups in
their order, so that any number of ranks adds the same numbers in the same order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.io import gather, rank, world_size

GROUPS = 8


def check_ranks() -> None:
    """Refuse more ranks than there are groups of micro-batches.

    Raises:
        ConfigError: says how many ranks there may be.
    """
    if world_size() > GROUPS:
        raise ConfigError(
            f"{world_size()} ranks were started, and output projections are solved by at most {GROUPS}; start {GROUPS} or fewer"
        )


class Share:
    """Division of micro-batches over the ranks.

    Args:
        held: whether each micro-batch is kept out of what is solved on.

    Attributes:
        own: numbers of this rank's micro-batches.
    """

    def __init__(self, held: Sequence[bool]) -> None:
        check_ranks()
        self.held = list(held)
        self.own = [i for group in range(rank(), GROUPS, world_size()) for i in range(group, len(held), GROUPS)]

    def rounds(self, held: bool) -> Iterator[list[list[int]]]:
        """Yield, a group a rank at a time, the micro-batches of each rank's group that are held out, or that are not."""
        for first in range(0, GROUPS, world_size()):
            groups = range(first, min(first + world_size(), GROUPS))
            yield [[i for i in range(group, len(self.held), GROUPS) if self.held[i] == held] for group in groups]

    def sum(self, values: Mapping[int, tuple[float, float]]) -> tuple[float, float]:
        """Sum pairs of numbers over the held-out micro-batches in their order; all ranks call it and get the sums.

        Args:
            values: of this rank's held-out micro-batches, by their number.
        """
        pairs = sorted((i, *pair) for part in gather(dict(values)) for i, pair in part.items())
        return sum(first for _, first, _ in pairs), sum(second for _, _, second in pairs)


def from_first_rank(make: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Compute a float64 tensor of the shape of `like` on the first rank and give it to all of them; contiguous.

    Args:
        make: called on the first rank alone.
        like: gives shape and device.
    """
    if rank() == 0:
        return broadcast(make().contiguous())
    return broadcast(torch.empty(like.shape, dtype=torch.float64, device=like.device))


def broadcast(tensor: Tensor) -> Tensor:
    """Replace a contiguous tensor, of one shape and dtype on all ranks, by the first rank's, in place; returns it."""
    if world_size() > 1:
        torch.distributed.broadcast(tensor, 0)
    return tensor


class NormalEquations:
    """Normal equations of a linear least-squares problem: sums of products, float64 over fp32 micro-batches."""

    def __init__(self) -> None:
        # F^T F [in, in], F^T own and F^T missing [in, out], sum of squares of own + missing []
        self.sums: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, features: Tensor, own: Tensor, missing: Tensor, weight: Tensor) -> None:
        """Add one micro-batch to the sums.

        Args:
            features: [..., in].
            own: the layer's own target, [..., out].
            missing: what the target has beside it, [..., out].
            weight: [...].
        """
        root = weight.flatten().sqrt()[:, None]
        f, y, d = (part.flatten(0, -2).float() * root for part in (features, own, missing))
        self._include(f.T @ f, f.T @ y, f.T @ d, (y + d).double().square().sum())

    def _include(self, *more: Tensor) -> None:
        if self.sums is None:
            gram, own, missing, energy = (part.double() for part in more)
            self.sums = gram, own, missing, energy
        else:
            for total, part in zip(self.sums, more):
                total.add_(part)

    def collect(self, part: "NormalEquations", senders: Sequence[int], weight: Tensor) -> None:
        """Add the sums of several ranks in their order, on the first rank; all ranks call it.

        Args:
            part: this rank's.
            senders: ranks whose part has a micro-batch.
            weight: a projection of the problem's shape, [out, in], on the device of the sums.
        """
        for sender in senders:
            if rank() == sender:
                assert part.sums is not None, "no micro-batch was added"
                if sender == 0:
                    self._include(*part.sums)
                else:
                    for tensor in part.sums:
                        torch.distributed.send(tensor, 0)
            elif rank() == 0:
                outputs, inputs = weight.shape
                shapes = (inputs, inputs), (inputs, outputs), (inputs, outputs), ()
                buffers = [torch.empty(shape, dtype=torch.float64, device=weight.device) for shape in shapes]
                for buffer in buffers:
                    torch.distributed.recv(buffer, sender)
                self._include(*buffers)

    def solve(self, prior: Tensor, damping: float, missing: bool = False) -> Tensor:
        """Solve for the projection, regularised towards `prior`: ridge regression by the Cholesky factor.

        Args:
            prior: [out, in].
            damping: weight of the squared distance from `prior`, relative to the mean of the features' sums of squares.
            missing: for all of the target; else for the layer's own one.

        Returns:
            [out, in], float64, on the sums' device.
        """
        assert self.sums is not None, "no micro-batch was added"
        gram, own, residual, _ = self.sums
        level = damping * gram.diagonal().mean()
        cross = own + residual if missing else own
        regular = gram + level * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        return torch.cholesky_solve(cross + level * prior.double().T, torch.linalg.cholesky_ex(regular)[0]).T

    def error(self, projection: Tensor) -> float:
        """Return the sum of squared errors of a projection [out, in] on all of the target."""
        assert self.sums is not None, "no micro-batch was added"
        gram, own, residual, energy = self.sums
        w = projection.double().T
        return float((w * (gram @ w - 2 * (own + residual))).sum() + energy)
