"""Logarithmic buckets of token positions and distances: 0-1K, 1K-2K, 2K-4K and on."""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_POSITION = 1024  # tokens of the first bucket of positions
FIRST_DISTANCE = 128  # tokens of the first bucket of distances between a fact and its question


class Buckets:
    """Sums of token values by bucket, on the device and in float64.

    Args:
        length: positions go from 0 to length - 1; later ones are counted in the last bucket.
        first: tokens of the first bucket; each later one ends at twice the place where it begins.
        values: number of values summed.
        device: device of the sums.
    """

    def __init__(self, length: int, first: int, values: int, device: torch.device) -> None:
        edges: list[int] = []
        while first * 2 ** len(edges) < length:
            edges.append(first * 2 ** len(edges))
        self._edges = torch.tensor(edges, dtype=torch.int64, device=device)
        self.names = bucket_names([0, *edges, edges[-1] * 2 if edges else first])
        self.sums = torch.zeros(values, len(self.names), dtype=torch.float64, device=device)

    def add(self, positions: Tensor, values: Sequence[Tensor]) -> None:
        """Add tokens' values; nothing waits for the GPU.

        Args:
            positions: integers [n].
            values: one [n] for each row of the sums.
        """
        bucket = torch.bucketize(positions.long(), self._edges, right=True)
        self.sums.index_add_(1, bucket, torch.stack([value.double() for value in values]))


def bucket_names(edges: Sequence[int]) -> list[str]:
    """Names of the buckets between edges: [0, 1024, 2048] -> ["0-1K", "1K-2K"]."""
    short = [f"{edge // 1024}K" if edge and edge % 1024 == 0 else str(edge) for edge in edges]
    return [f"{low}-{high}" for low, high in zip(short, short[1:])]
