"""Stage 1, Enhanced ILD: every student layer learns its teacher layer's output, fed the teacher's hidden state.

    L = sum_l  hidden_weight * mean_t ||h_l^s - h_l^t||_2  +  mixer_weight * mean_t ||a_l^s - a_l^t||_2

h_l is a layer's output (the last one after the final norm), a_l its mixer's output before the residual (HyLo;
un-squared norms as in the released Zebra-Llama trainer). Since each layer's input is the teacher's, layers do not
depend on one another: gradients are made layer by layer, and one layer's activations exist at a time. For the same
reason aligning a hybrid is aligning the pure-MLA and the pure-linear model, of which it has the chosen layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_hylo.config import ConfigError
from megatron_hylo.models.hylo_model import HyloModel


@dataclass
class AlignmentLoss:
    """Means over tokens, sums over layers; `layers` has the two terms of each layer: [layers, 2] (hidden, mixer)."""

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


def mixer_output(layer: nn.Module, hidden: Tensor) -> Tensor:
    """What a mixer layer adds to the residual stream: [sequence, batch, hidden] -> the same."""
    return layer.self_attention(layer.input_layernorm(hidden), attention_mask=None)[0]


def align_layers(
    student: HyloModel,
    teacher: HyloModel,
    input_ids: Tensor,
    hidden_weight: float = 1.0,
    mixer_weight: float = 1.0,
    gradient_scale: float | None = None,
) -> AlignmentLoss:
    """Both terms of every layer and, with `gradient_scale`, their gradients.

    Args:
        student, teacher: whole depth on this rank (no pipeline stages); the teacher gets no gradient.
        input_ids: int64 [batch, sequence].
        hidden_weight, mixer_weight: weights of the two terms; a term of weight 0 is not computed.
        gradient_scale: factor on the loss before `backward`; None measures only.
    """
    layers, total = [], input_ids.numel()
    with torch.no_grad():
        hidden = teacher.embedding(input_ids=input_ids, position_ids=None)
    pairs = list(zip(student.mixer_layers(), teacher.mixer_layers()))
    for index, ((mixer, mlp), (teacher_mixer, teacher_mlp)) in enumerate(pairs):
        last = index == len(pairs) - 1
        with torch.no_grad():
            target_mixer = mixer_output(teacher_mixer, hidden)
            target = _mlp_layer(teacher_mlp, hidden + target_mixer)
            compared = teacher.decoder.final_norm(target) if last else target
        with torch.set_grad_enabled(gradient_scale is not None):
            out_mixer = mixer_output(mixer, hidden)
            mixer_term = _mean_norm(out_mixer - target_mixer, total) if mixer_weight else hidden.new_zeros(())
            hidden_term = hidden.new_zeros(())
            if hidden_weight:
                out = _mlp_layer(mlp, hidden + out_mixer)
                out = student.decoder.final_norm(out) if last else out
                hidden_term = _mean_norm(out - compared, total)
            if gradient_scale is not None:
                ((hidden_weight * hidden_term + mixer_weight * mixer_term) * gradient_scale).backward()
        layers.append(torch.stack([hidden_term.detach().float(), mixer_term.detach().float()]))
        hidden = target
    terms = torch.stack(layers)
    return AlignmentLoss((terms * terms.new_tensor([hidden_weight, mixer_weight])).sum(), terms)


def _mlp_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    return hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]


def _mean_norm(difference: Tensor, tokens: int) -> Tensor:
    """Sum of the tokens' L2 norms over the number of tokens of all tensor-parallel ranks together."""
    return difference.float().norm(dim=-1).sum() / tokens
