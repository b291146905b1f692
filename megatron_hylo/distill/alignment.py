"""Alignment (stage 1): every student layer learns its teacher layer's output, with gradients inside the layer.

Three losses:

    mse         L = sum_l  mean_w (sum_t ||a_l^s - a_l^t||_2^2 / sum_t ||a_l^t||_2^2)
    ild         L = sum_l  hidden_weight * mean_t ||h_l^s - h_l^t||_2  +  mixer_weight * mean_t ||a_l^s - a_l^t||_2
    sequential  L = sum_l  mean_t ||m_l^s - m_l^t||_2^2 / (||m_l^s||_2^2 + ||m_l^t||_2^2)

a_l is a layer's mixer output before the residual, m_l the residual stream after it, h_l the layer's output (the last
one after the final norm), mean_t over all tokens, mean_w over windows and sum_t over the tokens of one, so that no loss
depends on how a step's windows are divided over micro-batches and ranks. `ild` is HyLo's Enhanced ILD (un-squared norms as
in the released Zebra-Llama trainer). `mse` compares mixers alone, as stage 1 of RADLADS and of KL-guided layer selection
(arXiv:2512.20569) does, and divides by the teacher's power, so that every layer counts alike: 1 is the loss of a mixer
that says nothing. `mse` runs no MLP of the student; it and `sequential` give only mixers a gradient.

With `mse` and `ild` a student layer reads the teacher's hidden state. With `sequential` it reads the student's own, as
`calibrate.solve` does, and learns to make up for what the layers before it got wrong (the divisor is held constant).

Where each layer's input is the teacher's, layers do not depend on one another: gradients are made layer by layer, and
one layer's activations exist at a time. For the same reason several students can learn from one forward pass of the
teacher, and aligning a hybrid is aligning the pure-MLA and the pure-linear model, of which it has the chosen layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.documents import EqualWindows, Packed, PackedDocuments


@dataclass
class AlignmentLoss:
    """Means over tokens, sums over layers; `layers` has the two terms of each layer: fp32 [layers, 2] (hidden, mixer)."""

    loss: Tensor
    layers: Tensor


def check_alignable(student: HyloModel, teacher: HyloModel) -> None:
    """Refuse a student whose layers do not pair with the teacher's.

    Raises:
        ConfigError: hidden size, number of layers or vocabulary differ.
    """
    s, t = student.config.hylo, teacher.config.hylo
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(s, name) != getattr(t, name):
            raise ConfigError(
                f"alignment needs a teacher of the same {name}: student {getattr(s, name)}, teacher {getattr(t, name)}"
            )


def mixer_output(layer: Any, hidden: Tensor, packed: Packed = None) -> Tensor:
    """Compute a mixer layer's output before the residual.

    Args:
        layer: Megatron-Core's layer of a mixer, with its input norm.
        hidden: [sequence (/ TP with sequence parallelism), batch, hidden].
        packed: documents of packed sequences.

    Returns:
        The same shape.
    """
    return layer.self_attention(layer.input_layernorm(hidden)[0], attention_mask=None, packed_seq_params=packed)[0]


def mlp_layer(layer: Any, hidden: Tensor) -> Tensor:
    """Compute the residual stream after an MLP layer: [sequence, batch, hidden] -> [sequence, batch, hidden]."""
    return hidden + layer.mlp(layer.pre_mlp_layernorm(hidden)[0])[0]


def align_layers(
    students: Sequence[HyloModel],
    teacher: HyloModel,
    input_ids: Tensor,
    align_loss: Literal["mse", "ild", "sequential"] = "mse",
    hidden_weight: float = 1.0,
    mixer_weight: float = 1.0,
    gradient_scale: float | None = None,
    documents: PackedDocuments | None = None,
    received: Tensor | None = None,
    windows: int = 1,
) -> tuple[list[AlignmentLoss], Tensor]:
    """Compute every layer's loss of every student and, with `gradient_scale`, its gradients, in one pass of the teacher.

    Args:
        students, teacher: the same layers of each model, all or those of a pipeline stage; the teacher gets no gradient.
        input_ids: int64 [batch, sequence].
        align_loss: see the module's formulas; all but `ild` have only a mixer term, of weight 1.
        hidden_weight, mixer_weight: of `ild`; a term of weight 0 is not computed.
        gradient_scale: factor on the loss before `backward`; None measures only.
        documents: of a packed sequence, batch 1.
        received: tensor that the previous pipeline stage returned; None on the first.
        windows: equal ones that a packed sequence is made of; `mse` divides each by its own power.

    Returns:
        A loss a student (with sequence parallelism a rank's part: the sum over the tensor-parallel ranks is the loss), and
        what the next stage reads: hidden states [sequence, batch, streams * hidden], of the teacher and, with
        `sequential`, of each student.
    """
    if align_loss != "ild":
        hidden_weight, mixer_weight = 0.0, 1.0
    terms: list[list[Tensor]] = [[] for _ in students]
    with torch.no_grad():
        if received is None:
            models = (teacher, *students) if align_loss == "sequential" else (teacher,)
            embedded = [m.embed(input_ids, documents) for m in models]
            streams, packed = [hidden for hidden, _ in embedded], embedded[0][1]
        else:
            streams, packed = received.split(teacher.config.hidden_size, dim=-1), documents
        hidden = streams[0]
        read = list(streams[1:]) or [hidden] * len(students)  # by each student's next layer
    pairs = list(zip(*(m.mixer_layers() for m in (teacher, *students)), strict=True))
    for index, (teacher_layer, *layers) in enumerate(pairs):
        last = teacher.post_process and index == len(pairs) - 1
        # layers run one by one here, not in the stack that would enter the context; without FP8 it is none
        with torch.no_grad(), get_fp8_context(teacher.config):
            target_mixer = mixer_output(teacher_layer[0], hidden, packed)
            target = mlp_layer(teacher_layer[1], hidden + target_mixer)
            compared = teacher.decoder.final_norm(target) if last else target
            power = None
            if align_loss == "mse":
                parts = _windows(target_mixer, packed, windows, teacher.config.sequence_parallel)
                power = _power(parts, teacher.config.sequence_parallel)
        for n, (student, (mixer, mlp), found) in enumerate(zip(students, layers, terms)):
            with torch.set_grad_enabled(gradient_scale is not None), get_fp8_context(student.config):
                out_mixer = mixer_output(mixer, read[n], packed)
                hidden_term = mixer_term = hidden.new_zeros(())
                if align_loss == "sequential":
                    middle = read[n] + out_mixer
                    mixer_term = relative_distance(middle, hidden + target_mixer).sum() / input_ids.numel()
                elif power is not None:
                    error = out_mixer.float() - target_mixer.float()
                    parts = _windows(error, packed, windows, student.config.sequence_parallel)
                    mixer_term = sum(part.square().sum() / p for part, p in zip(parts, power)) / len(parts)
                elif mixer_weight:
                    mixer_term = _mean_norm(out_mixer - target_mixer, input_ids.numel())
                if hidden_weight:
                    out = mlp_layer(mlp, hidden + out_mixer)
                    out = student.decoder.final_norm(out) if last else out
                    hidden_term = _mean_norm(out - compared, input_ids.numel())
                if gradient_scale is not None:
                    ((hidden_weight * hidden_term + mixer_weight * mixer_term) * gradient_scale).backward()
            found.append(torch.stack([hidden_term.detach().float(), mixer_term.detach().float()]))
            with torch.no_grad(), get_fp8_context(student.config):
                read[n] = mlp_layer(mlp, middle.detach()) if align_loss == "sequential" else target
        hidden = target
    stacked = [torch.stack(found) for found in terms]
    losses = [AlignmentLoss((hidden_weight * t[:, 0] + mixer_weight * t[:, 1]).sum(), t) for t in stacked]
    return losses, torch.cat([hidden, *read], dim=-1) if align_loss == "sequential" else hidden


def _mean_norm(difference: Tensor, tokens: int) -> Tensor:
    """Sum of the tokens' L2 norms over the number of tokens of all tensor-parallel ranks together."""
    return difference.float().norm(dim=-1).sum() / tokens


def relative_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """|a - b|^2 / (|a|^2 + |b|^2) of each token's hidden states, the divisor a constant: [..., hidden] -> fp32 [...]."""
    ours, theirs = ours.float(), theirs.float()
    size = ours.detach().square().sum(-1) + theirs.square().sum(-1)
    return (ours - theirs).square().sum(-1) / size


def _windows(x: Tensor, packed: Packed, count: int, sequence_parallel: bool) -> Sequence[Tensor]:
    """Return views of this rank's tokens of each window; empty ones of windows that other ranks have.

    Args:
        x: [sequence, batch, hidden], or packed [all tokens, 1, hidden].
        packed: how x holds windows.
        count: windows of a packed sequence of documents.
        sequence_parallel: each tensor-parallel rank has its part of the tokens.
    """
    if isinstance(packed, EqualWindows):
        return x.chunk(packed.count)
    if packed is None:
        return x.unbind(1)
    rank = parallel_state.get_tensor_model_parallel_rank() if sequence_parallel else 0
    first, size = packed.part.start + rank * len(x), packed.length // count
    return [x[max(n * size - first, 0) : max((n + 1) * size - first, 0)] for n in range(count)]


def _power(windows: Sequence[Tensor], sequence_parallel: bool) -> Tensor:
    """Sum each window's squares over all tensor-parallel ranks, and average over context-parallel ranks: fp32 [n]."""
    power = torch.stack([window.float().square().sum() for window in windows])
    if sequence_parallel:  # each rank has its part of the tokens; without, each has them all
        torch.distributed.all_reduce(power, group=parallel_state.get_tensor_model_parallel_group())
    if (ranks := parallel_state.get_context_parallel_world_size()) > 1:  # losses are averaged over these, not summed
        torch.distributed.all_reduce(power, group=parallel_state.get_context_parallel_group())
        power /= ranks
    return power
