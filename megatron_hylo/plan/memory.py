"""Prediction of the memory that a rank needs for training, before the first step.

Weights, gradients and optimizer state are exact. Activations are estimated from widths, for the kernels of a GPU: what a layer
keeps for its backward pass, in numbers a token. Peaks of H100s and H200s (CP) beside what is predicted, stage `distil`, GiB:

    1B hybrid (4 MLA, 12 Gated DeltaNet), 8B-shaped teacher, 65,536 tokens, recomputed     59.8, predicted 60.6
    the same, the teacher in FP8                                                           53.3, predicted 54.2
    the same, the teacher on other ranks                                                   46.3, predicted 46.7
    the same, the optimizer's state in the CPU's memory: its update is the fullest moment   43.2, predicted 43.0
    the same student without a teacher (stage `pretrain`)                                  44.8, predicted 45.7
    the same, 131,072 tokens on two context-parallel ranks                                 50.1, predicted 51.3
    the same on four; eight                                                                40.6; 36.0, predicted 39.1; 34.6
    the same, 262,144 tokens on four                                                       49.5, predicted 46.6
    131,072 tokens on one, the teacher in FP8                                              70.0, predicted 71.8
    3B hybrid (6 MLA, 22 Gated DeltaNet), 131,072 tokens on four                           70.8, predicted 68.5
    the first, MLA not recomputed                                                          64.6, predicted 66.0
    the same, 131,072 tokens on four; eight                                                43.4; 37.4, predicted 41.8; 36.0
    with Mamba2 layers instead, 65,536 tokens; 131,072 on four                             62.0; 42.4, predicted 63.6; 40.7
    135M hybrid and teacher, 8 windows of 2,048, nothing recomputed; 32                    17.0; 52.1, predicted 16.9; 52.2
    without a teacher, 65,536 tokens, MLPs and Gated DeltaNet recomputed; MLPs alone       49.6; 81.9, predicted 51.0; 90.1

and stage `align`, 1B, 262,144 tokens, all Gated DeltaNet; all Mamba2                      51.2; 48.0, predicted 52.0; 48.0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megatron_hylo.config import ModelConfig, recomputed_layers
from megatron_hylo.config.layer import Matrix
from megatron_hylo.config.mixers import ATTENTION_SYMBOL, MLA_SYMBOL, get_mixer
from megatron_hylo.config.mlps import MLPS, get_mlp
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.plan.muon import buffer_bytes, matrix_elements, rank_matrices
from megatron_hylo.plan.parameters import (
    description,
    layer_counts,
    linear_parameters,
    model_parameters,
    rank_parameters,
    stage_layers,
    stage_parameters,
    trained_parameters,
)

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_hylo.models.hylo_model import HyloModel
    from megatron_hylo.teachers.signal import TeacherSignal

GIB = 2**30
GRADIENT, MASTER, MOMENTS = 4, 4, 8  # bytes a trained parameter: fp32 gradient, fp32 copy of what is not fp32, Adam's two
MOMENT = 4  # bytes a parameter of Muon's: its momentum
FP8_COPIES = 2  # bytes a parameter of a linear map that computes in FP8: the weight and its transpose
MULTIPROCESSORS = 132  # of an H100 or H200
AROUND = 8  # tensors as wide as the model that live beside a layer in its backward pass


@dataclass(frozen=True)
class Memory:
    """Memory of one rank at the fullest moment of a step, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float  # its weights, or its head alone
    kept: float  # activations kept for the backward pass
    passing: float  # in use by a layer in its backward pass, a chunk of logits, the teacher's forward pass or Muon's update
    graphs: float = 0.0  # reserved by CUDA graphs, idle at that moment

    @property
    def total(self) -> float:
        """Sum of all: memory that the GPU must have."""
        return sum(asdict(self).values())

    @property
    def allocated(self) -> float:
        """Largest sum of tensors, as `torch.cuda.max_memory_allocated` counts it: without what graphs only reserve."""
        return self.total - self.graphs

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in asdict(self).items() if value or name != "graphs")
        return f"{self.total / GIB:.1f} GiB ({parts})"


def predict_memory(
    config: TrainConfig,
    students: Sequence[Sequence[HyloModel]],
    teacher: Sequence[HyloModel] | None,
    teacher_signal: TeacherSignal | None,
    optimizer_shards: int,
    expert_shards: int = 1,
) -> Memory:
    """Predict this rank's memory at the fullest moment of a step.

    Args:
        config: the run.
        students: this rank's chunks of each, with `requires_grad` as in training.
        teacher: its chunks, where it is on these ranks.
        teacher_signal: a teacher that is not.
        optimizer_shards: ranks that share the optimizer's state; 1 if none do.
        expert_shards: the same of parameters that expert parallelism divides.
    """
    parameters = [p for chunks in students for chunk in chunks for p in chunk.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    count = sum(p.numel() for p in trained)
    theirs: list[Tensor] = [p for chunk in teacher or () for p in chunk.parameters()]
    if teacher_signal is not None and (head := teacher_signal.head_weight()) is not None:
        theirs.append(head)
    theirs_shape = teacher[0].config.hylo if teacher else None
    kept, passing = max((activations(config, chunks[0].config.hylo, theirs_shape) for chunks in students), key=sum)
    optimizer, tensor, updates = 0.0, config.parallel.tensor_model_parallel_size, []
    for chunks in students:
        matrices = Counter[Matrix]()
        for p in (p for chunk in chunks for p in chunk.parameters() if p.requires_grad):
            of_muon = (
                config.optimizer.name == "muon" and p.dim() == 2 and not getattr(p, "is_embedding_or_output_parameter", False)
            )
            if of_muon:
                divided = getattr(p, "partition_dim", -1)
                rows, columns = (size * tensor if dimension == divided else size for dimension, size in enumerate(p.shape))
                matrices[Matrix(rows, columns, divided >= 0)] += 1
            each = p.numel() * ((MOMENT if of_muon else MOMENTS) + (0 if p.element_size() == 4 else MASTER))
            optimizer += each / (optimizer_shards if getattr(p, "allreduce", True) else expert_shards)
        updates.append(buffer_bytes(matrices, tensor, config.precision == "bf16"))
    optimizer, kept, passing, graphs = _fullest(config, optimizer, kept, passing, updates)
    return Memory(
        weights=_bytes(parameters),
        gradients=GRADIENT * count,
        optimizer=optimizer,
        teacher=_bytes(theirs) - (_on_cpu(teacher) if teacher and config.teacher_offload else 0),
        kept=kept,
        passing=passing,
        graphs=graphs,
    )


def _bytes(tensors: Sequence[Tensor]) -> float:
    return sum(x.numel() * x.element_size() for x in tensors)


def _on_cpu(teacher: Sequence[HyloModel]) -> float:
    """Bytes of the weights that `models/offload.py` keeps on the CPU: all but two layers'."""
    from megatron_hylo.models.offload import offloaded_units

    units = [[_bytes([*unit.parameters()]) for unit in offloaded_units(chunk)] for chunk in teacher]
    return sum(sum(sizes) - 2 * max(sizes) for sizes in units)


def estimate_memory(
    config: TrainConfig, ranks: int, students: Sequence[ModelConfig], teachers: Sequence[ModelConfig]
) -> Memory:
    """Memory of the fullest rank from architectures alone; `predict_memory` has the models themselves.

    Args:
        config: settings of the run.
        ranks: processes of the run.
        students: one or two.
        teachers: those on the same ranks, one or none.
    """
    p, number = config.parallel, 2 if config.precision == "bf16" else 4
    tensor, pipeline = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    shards, stage = max(ranks // (tensor * pipeline), 1), max(ranks // pipeline, 1)
    count = sum(rank_parameters(config, c) for c in students)
    trained = sum(rank_parameters(config, c, trained=True) for c in students)
    each = sum(moments(config, c) for c in students) / sum(trained_parameters(config, c) for c in students)
    optimizer = (each + (MASTER if number == 2 else 0)) * trained
    if config.optimizer.use_distributed_optimizer:  # all ranks of a pipeline stage share all of its state, experts' too
        whole = sum(rank_parameters(config, c, trained=True, divided=False) for c in students)
        optimizer *= whole / (stage * trained)
    theirs_shape = teachers[0] if teachers else None
    replicas = max(shards // p.context_parallel_size, 1)
    kept, passing = max((activations(config, c, theirs_shape, replicas) for c in students), key=sum)
    updates = [update_bytes(config, c) for c in students]
    optimizer, kept, passing, graphs = _fullest(config, optimizer, kept, passing, updates)
    weights = number * count
    if config.linear_precision == "fp8":
        weights += FP8_COPIES * count / sum(map(model_parameters, students)) * sum(map(linear_parameters, students))
    return Memory(weights, GRADIENT * trained, optimizer, _teacher_bytes(config, teachers), kept, passing, graphs)


def _teacher_bytes(config: TrainConfig, teachers: Sequence[ModelConfig]) -> float:
    """Weights of a teacher on the fullest of the students' ranks.

    With its layers in CPU memory these are two layers of each model chunk, the embedding and the head.
    """
    p, number, total = config.parallel, 2 if config.precision == "bf16" else 4, 0.0
    pipeline, virtual = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    for shape in teachers:
        bytes_each, end = 1 if config.teacher_precision == "fp8" else number, shape.vocab_size * shape.hidden_size
        chunks = [
            stage_parameters(shape, layers, p.tensor_model_parallel_size, p.expert_model_parallel_size)
            * (min(1.0, 2 / sum(layers.get(symbol, 0) for symbol in MLPS)) if config.teacher_offload else 1.0)
            for layers in stage_layers(shape, pipeline * virtual)
        ]
        ends = [0.0] * pipeline
        ends[0] = ends[-1] = end  # embedding; head, a copy of the embedding where they are tied
        if pipeline == 1:
            ends = [model_parameters(shape) - linear_parameters(shape)]
        ends = [number * each / p.tensor_model_parallel_size for each in ends]
        total += max(ends[rank] + bytes_each * sum(chunks[rank::pipeline]) for rank in range(pipeline))
    return total


def moments(config: TrainConfig, shape: ModelConfig) -> float:
    """Bytes of the moments of a student's trained parameters on all ranks: Adam's two, of matrices Muon's one."""
    trained = trained_parameters(config, shape)
    matrices = sum(map(matrix_elements, rank_matrices(config, shape)))
    return MOMENT * matrices + MOMENTS * (trained - matrices)


def update_bytes(config: TrainConfig, shape: ModelConfig) -> float:
    """Bytes of the buffers of Muon's update on the pipeline rank that needs most; 0 of AdamW's, which has none."""
    tensor, bf16 = config.parallel.tensor_model_parallel_size, config.precision == "bf16"
    return max(buffer_bytes(matrices, tensor, bf16) for matrices in rank_matrices(config, shape))


def _fullest(
    config: TrainConfig, optimizer: float, kept: float, passing: float, updates: Sequence[float]
) -> tuple[float, float, float, float]:
    """Bytes of (optimizer, kept, passing) at the fuller moment, and what CUDA graphs reserve besides.

    The moments are the passes and the update with its buffers, of one student after the other. Activations are gone by the
    update; an offloaded optimizer's state is there for it alone. What a graph has used stays reserved for its replays, so with
    graphs the GPU must have the memory of all of them. The allocator counts what a capture has freed as free all the same, so
    measured peaks are without it.
    """
    during, update = 0.0 if config.optimizer.offload else optimizer, max(updates)
    passes, stepping = during + kept + passing, optimizer + update
    graphs = optimizer + kept + passing + sum(updates) - max(passes, stepping) if config.cuda_graphs else 0.0
    return (optimizer, 0.0, update, graphs) if stepping > passes else (during, kept, passing, graphs)


def in_flight(pipeline: int, virtual: int, micro_batches: int) -> float:
    """Largest share of the model's layers whose activations a pipeline rank keeps, over its micro-batches in flight.

    The first rank has `pipeline` micro-batches of 1 / pipeline of the layers under 1F1B, and its warm-up's model chunks and one
    more under the interleaved schedule (Megatron-Core's `forward_backward_pipelining_with_interleaving`).
    """
    if virtual == 1:
        return min(pipeline, micro_batches) / pipeline
    return min(2 * (pipeline - 1) + (virtual - 1) * pipeline + 1, micro_batches * virtual) / (pipeline * virtual)


def activations(
    config: TrainConfig, ours: ModelConfig, theirs: ModelConfig | None, data_parallel: int = 1
) -> tuple[float, float]:
    """Activations at the fullest moment of a step: (bytes kept for the backward pass, bytes in use by the computation).

    Args:
        config: the run.
        ours: the student.
        theirs: a teacher on the same ranks.
        data_parallel: ranks that share the batch.
    """
    kept, passing = activation_parts(config, ours, theirs, data_parallel)
    if config.stage == "align":  # a layer has its backward pass before the next
        return kept, max(passing.values())
    busy = max(passing["layer"], passing["loss"])
    return (kept, busy) if kept + busy > passing["teacher"] else (0.0, passing["teacher"])


def activation_parts(
    config: TrainConfig, ours: ModelConfig, theirs: ModelConfig | None, data_parallel: int = 1
) -> tuple[float, dict[str, float]]:
    """Bytes kept for the backward pass, and bytes that computations need one after the other.

    Args:
        config, ours, theirs, data_parallel: see `activations`.

    Returns:
        Kept bytes; those of a layer in its backward pass, of the loss over a chunk of logits, of the teacher's forward pass.
    """
    p, number = config.parallel, 2 if config.precision == "bf16" else 4
    tokens = config.micro_batch_size * config.sequence_length / p.context_parallel_size
    ranks, h = p.tensor_model_parallel_size, ours.hidden_size
    times = layer_counts(ours)
    forward = 0.0
    if theirs:
        widest = max(get_mlp(symbol).kept_numbers(theirs, ranks) for symbol in set(theirs.mlps))
        forward = tokens * number * (widest + 4 * theirs.hidden_size)
    residual = h / ranks if p.sequence_parallel else h  # of hidden states and norms, which sequence parallelism divides
    saved = {symbol: kept_numbers(ours, symbol, ranks) - h + residual for symbol in times}
    scratch = {symbol: _scratch_numbers(ours, symbol, ranks) + _split_numbers(config, ours, symbol) for symbol in times}
    busy = max(2 * saved[symbol] + scratch[symbol] for symbol in times)
    layer = tokens * number * (busy + AROUND * residual)
    if config.stage == "align":
        return 2 * tokens * number * residual, {"layer": layer, "loss": 0.0, "teacher": forward}
    again = recomputed_layers(config.recompute)
    numbers = [times[s] * (residual if s in again else saved[s] + residual) for s in times]
    passes = max(config.global_batch_size // (config.micro_batch_size * data_parallel), 1)
    waiting = in_flight(p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size, passes)
    models, vocabulary = 1 if config.stage == "pretrain" else 2, ours.vocab_size / ranks
    head = min(config.loss_chunk_tokens, tokens) * vocabulary * (4 * models + number)  # logits in fp32, their gradient
    head += 4 * vocabulary * h + models * tokens * number * residual  # the head's gradient; hidden states
    return tokens * number * sum(numbers) * waiting, {"layer": layer, "loss": head, "teacher": forward}


def kept_numbers(c: ModelConfig, symbol: str, ranks: int = 1) -> float:
    """Numbers a token that a mixer or MLP keeps for its backward pass on one of `ranks` tensor-parallel ranks."""
    return description(symbol).kept_numbers(c, ranks)


def _scratch_numbers(c: ModelConfig, symbol: str, ranks: int) -> float:
    return 0.0 if symbol in MLPS else get_mixer(symbol).scratch_numbers(c, ranks)


def _split_numbers(config: TrainConfig, c: ModelConfig, symbol: str) -> float:
    """Numbers a token of flash attention's deterministic backward pass, by its source; not measured.

    It adds up the queries' gradient in fp32 [splits, batch, tokens, heads, width], in ceil(multiprocessors / (batch * heads))
    splits, so that there is work for each multiprocessor. In fp32 torch takes another kernel, which has none.
    """
    widths = {MLA_SYMBOL: max(c.qk_head_dim + c.qk_pos_emb_head_dim, c.v_head_dim), ATTENTION_SYMBOL: c.kv_channels}
    if not config.deterministic or config.precision != "bf16" or symbol not in widths:
        return 0.0
    heads, step = c.num_attention_heads // config.parallel.tensor_model_parallel_size, 32 if widths[symbol] <= 128 else 64
    splits, width = -(-MULTIPROCESSORS // (config.micro_batch_size * heads)), -(-widths[symbol] // step) * step
    return 4 / 2 * splits * heads * width
