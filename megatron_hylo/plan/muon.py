"""Work and memory of Muon's update: products of Newton-Schulz iterations, what ranks gather, and buffers beside the state.

A matrix of m x n or n x m numbers, m the smaller, takes 4 m^2 n + 2 m^3 FLOPs an iteration: X X^T, that product's square, and
its polynomial's product with X. Tensor-parallel ranks gather a matrix and compute all of it, each.
"""

import functools
from collections import Counter
from collections.abc import Mapping

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layer import Matrix
from megatron_hylo.config.mlps import MLPS
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.plan.parameters import description, given_layers, stage_layers, trains_mlps

ITERATIONS = 5
TOGETHER = 2**26  # elements of matrices that are orthogonalised together at most: 256 MiB in fp32


def check_muon_shape(shape: ModelConfig) -> None:
    """Refuse a student that Muon does not train.

    Raises:
        ConfigError: it has experts.
    """
    if shape.has_experts:
        raise ConfigError("optimizer.name muon is not supported for mixtures of experts; set it to adamw")


def rank_matrices(config: TrainConfig, shape: ModelConfig) -> tuple[Counter[Matrix], ...]:
    """Count Muon's matrices on each pipeline rank, each matrix as it is over all tensor-parallel ranks.

    Args:
        config: the run; none where its optimizer is another.
        shape: the student.

    Raises:
        ConfigError: it has experts.
    """
    p = config.parallel
    if config.optimizer.name != "muon":
        return (Counter[Matrix](),) * p.pipeline_model_parallel_size
    check_muon_shape(shape)
    return _rank_matrices(shape, p.pipeline_model_parallel_size, p.pipeline_stages, given_layers(config), trains_mlps(config))


@functools.lru_cache(256)
def _rank_matrices(
    shape: ModelConfig, ranks: int, stages: int, given: tuple[int, ...] | None, mlps: bool
) -> tuple[Counter[Matrix], ...]:
    found = tuple(Counter[Matrix]() for _ in range(ranks))
    for stage, layers in enumerate(stage_layers(shape, stages, given)):
        for symbol, count in layers.items():
            for matrix in () if symbol in MLPS and not mlps else description(symbol).matrices(shape):
                found[stage % ranks][matrix] += count
    return found


def matrix_elements(matrices: Mapping[Matrix, int]) -> int:
    """Number of elements of all matrices."""
    return sum(count * one.rows * one.columns for one, count in matrices.items())


def newton_schulz_flops(matrices: Mapping[Matrix, int]) -> float:
    """FLOPs of the iterations of one step on a rank that has these matrices or parts of them."""
    total = 0.0
    for matrix, count in matrices.items():
        m, n = sorted(matrix[:2])
        total += count * ITERATIONS * (4.0 * m * m * n + 2.0 * m**3)
    return total


def gathered_bytes(matrices: Mapping[Matrix, int], tensor: int) -> float:
    """Bytes that one of `tensor` tensor-parallel ranks receives in one step: the others' parts of updates, in fp32."""
    divided = {matrix: count for matrix, count in matrices.items() if matrix.divided}
    return 4 * (tensor - 1) / tensor * matrix_elements(divided)


def buffer_bytes(matrices: Mapping[Matrix, int], tensor: int, bf16: bool) -> float:
    """Bytes of the largest batch of matrices that are orthogonalised together, at its fullest moment.

    Args:
        matrices: of a rank.
        tensor: tensor-parallel ranks.
        bf16: products are bf16, else fp32.
    """
    return max((_batch_bytes(matrix, count, tensor, bf16) for matrix, count in matrices.items()), default=0.0)


def _batch_bytes(matrix: Matrix, count: int, tensor: int, bf16: bool) -> float:
    """Bytes of one shape's batch.

    In fp32 an element has its update, what the iterations leave of it, and two copies while that is scaled: 16 bytes. In an
    iteration it has its update, and in the products' dtype its iterate, the next one, and of X X^T and that product's
    polynomial m / n each. A gathered matrix has the ranks' parts and the whole besides.
    """
    m, n = sorted(matrix[:2])
    elements, width = m * n, 2 if bf16 else 4
    elements *= min(count, max(1, TOGETHER // elements))
    iteration = 4 + 2 * width * (1 + m / n)
    begun = 8 + (width if bf16 else 0)  # the normalised update, before its fp32 copy is freed
    if tensor == 1 or not matrix.divided:
        return elements * max(iteration, begun, 16)
    part = 4 / tensor
    return elements * max(4 + part + max(iteration, begun), 4 + 3 * part)
