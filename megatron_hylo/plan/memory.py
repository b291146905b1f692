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

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from megatron_hylo.config import ModelConfig, recomputed_layers
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.offload import offloaded_units
from megatron_hylo.teachers.signal import TeacherSignal

GIB = 2**30
GRADIENT, MASTER, MOMENTS = 4, 4, 8  # bytes a trained parameter: fp32 gradient, fp32 copy of what is not fp32, Adam's two
AROUND = 8  # tensors as wide as the model that live beside a layer in its backward pass


@dataclass(frozen=True)
class Memory:
    """Memory of one rank at the fullest moment of a step, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float  # its weights, or its head alone
    kept: float  # activations kept for the backward pass
    passing: float  # in use by the computation: a layer in its backward pass, a chunk of logits, the teacher's forward pass

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in asdict(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def predict_memory(
    config: TrainConfig,
    students: Sequence[Sequence[HyloModel]],
    teacher: Sequence[HyloModel] | None,
    teacher_signal: TeacherSignal | None,
    optimizer_shards: int,
) -> Memory:
    """Predict this rank's memory at the fullest moment of a step.

    Args:
        config: the run.
        students: this rank's chunks of each, with `requires_grad` as in training.
        teacher: its chunks, where it is on these ranks.
        teacher_signal: a teacher that is not.
        optimizer_shards: ranks that share the optimizer's state; 1 if none do.
    """
    parameters = [p for chunks in students for chunk in chunks for p in chunk.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    count, wide = (sum(p.numel() for p in chosen) for chosen in (trained, [p for p in trained if p.element_size() == 4]))
    theirs: list[Tensor] = [p for chunk in teacher or () for p in chunk.parameters()]
    if teacher_signal is not None and (head := teacher_signal.head_weight()) is not None:
        theirs.append(head)
    theirs_shape = teacher[0].config.hylo if teacher else None
    kept, passing = max((activations(config, chunks[0].config.hylo, theirs_shape) for chunks in students), key=sum)
    optimizer = (MOMENTS * count + MASTER * (count - wide)) / optimizer_shards
    if config.optimizer.offload:  # either the passes' activations or, later, the optimizer's state
        optimizer, kept, passing = (0.0, kept, passing) if kept + passing > optimizer else (optimizer, 0.0, 0.0)
    return Memory(
        weights=_bytes(parameters),
        gradients=GRADIENT * count,
        optimizer=optimizer,
        teacher=_bytes(theirs) - (_on_cpu(teacher) if teacher and config.teacher_offload else 0),
        kept=kept,
        passing=passing,
    )


def _bytes(tensors: Sequence[Tensor]) -> float:
    return sum(x.numel() * x.element_size() for x in tensors)


def _on_cpu(teacher: Sequence[HyloModel]) -> float:
    """Bytes of the weights that `models/offload.py` keeps on the CPU: all but two layers'."""
    units = [[_bytes([*unit.parameters()]) for unit in offloaded_units(chunk)] for chunk in teacher]
    return sum(sum(sizes) - 2 * max(sizes) for sizes in units)


def activations(config: TrainConfig, ours: ModelConfig, theirs: ModelConfig | None) -> tuple[float, float]:
    """Activations at the fullest moment of a step: (bytes kept for the backward pass, bytes in use by the computation).

    Args:
        config: the run.
        ours: the student.
        theirs: a teacher on the same ranks.
    """
    p, number = config.parallel, 2 if config.precision == "bf16" else 4
    tokens = config.micro_batch_size * config.sequence_length / p.context_parallel_size
    ranks, h = p.tensor_model_parallel_size, ours.hidden_size
    symbols = [symbol for mixer in ours.mixers for symbol in (mixer, "-")]
    forward = tokens * number * (3 * theirs.ffn_hidden_size / ranks + 5 * theirs.hidden_size) if theirs else 0.0
    busy = max(2 * kept_numbers(ours, symbol, ranks) + _scratch_numbers(ours, symbol, ranks) for symbol in symbols)
    layer = tokens * number * (busy + AROUND * h)
    if config.stage == "align":  # a layer has its backward pass before the next
        return 2 * tokens * number * h, max(layer, forward)
    again = recomputed_layers(config.recompute)
    numbers = [h if symbol in again else kept_numbers(ours, symbol, ranks) + h for symbol in symbols]
    waiting = (
        min(p.pipeline_stages, config.micro_batches(1)) / p.pipeline_stages
    )  # a stage has its share of the layers, of so many micro-batches
    kept = tokens * number * sum(numbers) * waiting
    models, vocabulary = 1 if config.stage == "pretrain" else 2, ours.vocab_size / ranks
    head = min(config.loss_chunk_tokens, tokens) * vocabulary * (4 * models + number)  # logits in fp32, their gradient
    head += 4 * vocabulary * h + models * tokens * number * h  # the head's gradient; hidden states
    return (kept, max(layer, head)) if kept + max(layer, head) > forward else (0.0, forward)


def kept_numbers(c: ModelConfig, symbol: str, ranks: int = 1) -> float:
    """Numbers a token that a layer keeps for its backward pass on one of `ranks` tensor-parallel ranks; "-" is an MLP."""
    if symbol == "-":
        return c.hidden_size + 3 * c.ffn_hidden_size / ranks  # norm's output; both halves of SwiGLU, their product
    return get_mixer(symbol).kept_numbers(c, ranks)


def _scratch_numbers(c: ModelConfig, symbol: str, ranks: int) -> float:
    return 0.0 if symbol == "-" else get_mixer(symbol).scratch_numbers(c, ranks)
