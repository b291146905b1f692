"""Losses of the output head without its logits: KL to a teacher and cross-entropy, in chunks of tokens.

For student hidden h [N, H_s], head W_s [V, H_s], teacher hidden [N, H_t], head W_t [V, H_t], with p = softmax:

    L = kl_weight * mean_n KL_n + ce_weight * mean_n -log p_s[label_n]
    forward   KL = sum_v p_t (log p_t - log p_s)    gradient with respect to the student's logits: p_s - p_t
    reverse   KL = sum_v p_s (log p_s - log p_t)                                                   p_s (log p_s - log p_t - KL)

over the full vocabulary (forward, at temperature 1: HyLo stages 2 and 3; Zebra-Llama's trainer; reverse: MiniLLM,
arXiv:2306.08543). With a temperature T the logits of both are divided by it and the KL is multiplied by T^2, so that its
gradients keep their size (Hinton et al., arXiv:1503.02531); cross-entropy stays at temperature 1. Both gradients are made
in the forward pass, a chunk at a time: [chunk, V] is the size of the largest tensor that ever exists.
With tensor parallelism the vocabulary is split over ranks; only the soft-max statistics are reduced, never logits.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.kernels.head_softmax import head_softmax, obstacle
from megatron_hylo.kernels.registry import select
from megatron_hylo.models.hylo_model import HyloModel

Direction = Literal["forward", "reverse"]


@dataclass
class HeadLoss:
    """Means over tokens. `loss` carries the gradient; the others are for reports (None where not asked for).

    `kl` is in the direction and at the temperature of the loss, with its T^2.
    """

    loss: Tensor
    kl: Tensor | None
    cross_entropy: Tensor | None
    agreement: Tensor | None  # part of the tokens whose most likely continuation is the teacher's


def model_head_loss(
    student: HyloModel,
    hidden: Tensor,
    labels: Tensor | None = None,
    teacher: Any = None,
    teacher_hidden: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk_tokens: int = 1024,
    measure_agreement: bool = False,
    kl_direction: Direction = "forward",
    kl_temperature: float = 1.0,
) -> HeadLoss:
    """`linear_head_loss` for a model's hidden states, whatever the tensor and sequence parallelism.

    Args:
        student: gives the head's weight.
        hidden: the student's output, [sequence (/ TP), batch, H_s].
        labels: int64 [batch, sequence]; needed where cross-entropy is wanted.
        teacher, teacher_hidden: the frozen teacher (a model, or a `StoredTeacher`) and its output; both or neither.
        kl_weight, ce_weight, chunk_tokens, measure_agreement, kl_direction, kl_temperature: see `linear_head_loss`.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    full = _full_tokens(hidden, student.config.sequence_parallel, group)
    teacher_full = None
    if teacher is not None:
        with torch.no_grad():
            teacher_full = _full_tokens(teacher_hidden, teacher.config.sequence_parallel, group).flatten(0, 1)
    return linear_head_loss(
        full.flatten(0, 1),
        student.head_weight(),
        labels.transpose(0, 1).flatten() if labels is not None else None,
        teacher_full,
        teacher.head_weight() if teacher is not None else None,
        kl_weight,
        ce_weight,
        chunk_tokens,
        group,
        measure_agreement,
        kl_direction,
        kl_temperature,
    )


def _full_tokens(hidden: Tensor, sequence_parallel: bool, group: dist.ProcessGroup) -> Tensor:
    """All tokens on every rank; in the backward pass the ranks' partial gradients are summed."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(hidden, group=group)


def linear_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    chunk_tokens: int = 1024,
    group: dist.ProcessGroup | None = None,
    measure_agreement: bool = False,
    kl_direction: Direction = "forward",
    kl_temperature: float = 1.0,
) -> HeadLoss:
    """KL and cross-entropy of a linear head, see the module's formula; soft-max in fp32 whatever the inputs' dtype.

    Args:
        hidden: [N, H_s].
        weight: this rank's rows [V / TP, H_s].
        labels: int64 [N], global token ids; a negative one has no cross-entropy but counts in the mean; without them none.
        teacher_hidden: [N, H_t], no gradient.
        teacher_weight: this rank's rows [V / TP, H_t].
        kl_weight: ignored without a teacher.
        ce_weight: ignored without labels; the loss without a teacher is the cross-entropy, whatever this is.
        chunk_tokens: tokens whose logits exist at a time.
        group: ranks that share the vocabulary; gradients with respect to `hidden` are this rank's partial sums.
        measure_agreement: also compare the most likely tokens.
        kl_direction, kl_temperature: see the module's formulas.

    Raises:
        ConfigError: the heads' vocabularies differ, or there is neither teacher nor label.
    """
    if teacher_weight is None and labels is None:
        raise ConfigError("a head loss needs a teacher or labels")
    if teacher_weight is not None and teacher_weight.shape[0] != weight.shape[0]:
        raise ConfigError(
            f"the teacher's vocabulary has {teacher_weight.shape[0]} rows a rank, the student's {weight.shape[0]}; "
            f"distil between models with the same vocabulary"
        )
    weights = (kl_weight, ce_weight) if teacher_weight is not None else (0.0, 1.0)
    if labels is None:
        weights = (weights[0], 0.0)
    loss, sums = _LinearHeadLoss.apply(
        hidden, weight, labels, teacher_hidden, teacher_weight, weights, chunk_tokens, group, measure_agreement,
        kl_direction == "reverse", kl_temperature,
    )  # fmt: skip
    kl, cross_entropy, agreement = sums / hidden.shape[0]
    return HeadLoss(
        loss,
        kl if teacher_weight is not None else None,
        cross_entropy if labels is not None else None,
        agreement if measure_agreement and teacher_weight is not None else None,
    )


class _LinearHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, teacher_hidden, teacher_weight, weights, chunk_tokens, group, measure_agreement, reverse,
        temperature,
    ):  # fmt: skip
        kl_weight, ce_weight = weights
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wants_grad = wants_hidden or wants_weight
        n, compute = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(3, dtype=compute, device=hidden.device)  # KL, cross-entropy, agreeing tokens
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=compute, device=weight.device) if wants_weight else None
        first = group.rank() * weight.shape[0] if group is not None else 0
        # the most likely tokens are compared in evaluations alone, which need not be fast
        fused = not measure_agreement and select("head_softmax", "triton", obstacle(hidden)) == "triton"
        for start in range(0, n, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, n))
            logits = _logits(hidden[chunk], weight, compute)
            teacher_logits = _logits(teacher_hidden[chunk], teacher_weight, compute) if teacher_weight is not None else None
            own_labels = labels[chunk] if labels is not None else None
            if fused:
                *found, grad = head_softmax(
                    logits, teacher_logits, own_labels, first, kl_weight * temperature / n, ce_weight / n, reverse, temperature,
                    group, weight.dtype if wants_grad else None,
                )  # fmt: skip
                sums[:2] += torch.stack(found)
            else:
                found, grad = _plain(
                    logits.to(compute), teacher_logits, own_labels, first, weights, reverse, temperature, group, wants_grad,
                    measure_agreement,
                )  # fmt: skip
                sums += found
                grad = grad if grad is None else grad.div_(n).to(weight.dtype)
            del logits, teacher_logits
            if wants_hidden:
                grad_hidden[chunk] = grad @ weight
            if wants_weight:
                grad_weight += (grad.t() @ hidden[chunk]).to(compute)
        ctx.grads = grad_hidden, grad_weight.to(weight.dtype) if wants_weight else None
        loss = (kl_weight * sums[0] + ce_weight * sums[1]) / n
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        scale = lambda g: g if g is None else g.mul_(grad_loss.to(g.dtype))  # noqa: E731
        return scale(grad_hidden), scale(grad_weight), *[None] * 9


def _logits(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """[n, V / TP], on a GPU in the dtype of its sums: bf16 would round a logit of 10 by 0.03, which late gradients show."""
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, weight.t(), out_dtype=wide)
    return hidden @ weight.t()


def _plain(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, first: int, weights: tuple[float, float],
    reverse: bool, temperature: float, group: dist.ProcessGroup | None, wants_grad: bool, measure_agreement: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(sums over tokens of KL, cross-entropy and agreement, [3]; their weighted gradient): the oracle of `head_softmax`.

    Args:
        logits: the student's, [n, V / TP], fp32 or wider; may be used up.
        teacher_logits: [n, V / TP] or None.
        labels, first, weights, reverse, temperature, group, wants_grad, measure_agreement: of the loss.
    """
    kl_weight, ce_weight = weights
    sums, grad = logits.new_zeros(3), None
    log_p = _log_softmax(logits, group)
    if labels is not None:
        picked, grad = _cross_entropy(log_p, labels, first, ce_weight if wants_grad else 0.0)
        sums[1] -= _all_reduce(picked, group)
    if teacher_logits is not None:
        teacher_logits = teacher_logits.to(logits.dtype)
        if measure_agreement:
            sums[2] += (_argmax(log_p, first, group) == _argmax(teacher_logits, first, group)).sum()
        if temperature != 1.0:  # log p up to a constant a token is as good as the logits
            log_p, teacher_logits = _log_softmax(log_p / temperature, group), teacher_logits / temperature
        kl, slope = _kl(log_p, _log_softmax(teacher_logits, group), reverse, group, wants_grad)
        sums[0] += kl * temperature**2
        if slope is not None:
            slope.mul_(kl_weight * temperature)
            grad = slope if grad is None else grad.add_(slope)
    return sums, grad


def _cross_entropy(log_p: Tensor, labels: Tensor, first: int, weight: float) -> tuple[Tensor, Tensor | None]:
    """(sum over tokens of log p[label], where this rank has it; the gradient weight (p - onehot), None for weight 0).

    Args:
        log_p: this rank's part of the vocabulary, [n, V / TP].
        labels: int64 [n] of the whole vocabulary; a negative one counts nothing.
        first: number of this rank's first row.
        weight: of the gradient.
    """
    local = labels - first
    mine = (local >= 0) & (local < log_p.shape[1])
    index = local.clamp(0, log_p.shape[1] - 1).unsqueeze(1)
    picked = torch.where(mine, log_p.gather(1, index).squeeze(1), 0).sum()
    if not weight:
        return picked, None
    known, mine = (flag.to(log_p.dtype).unsqueeze(1) for flag in (labels >= 0, mine))
    return picked, log_p.exp().mul_(weight * known).scatter_add_(1, index, -weight * mine)


def _kl(
    log_p: Tensor, log_q: Tensor, reverse: bool, group: dist.ProcessGroup | None, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum over tokens of the KL, on every rank; its gradient with respect to the student's logits): [n, V / TP]."""
    if not reverse:
        q = log_q.exp()
        kl = _all_reduce((q * (log_q - log_p)).sum(), group)
        return kl, log_p.exp().sub_(q) if wants_grad else None
    p, difference = log_p.exp(), log_p - log_q
    kl = _all_reduce((p * difference).sum(-1, keepdim=True), group)
    return kl.sum(), p.mul_(difference.sub_(kl)) if wants_grad else None


def _all_reduce(value: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(value, op=op, group=group)
    return value


def _log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log soft-max over a vocabulary split over `group`: [n, V / TP]; two reductions of n numbers."""
    if group is None or group.size() == 1:
        return torch.log_softmax(logits, dim=-1)
    largest = _all_reduce(logits.amax(dim=-1, keepdim=True), group, dist.ReduceOp.MAX)
    logits = logits.sub_(largest)
    total = _all_reduce(logits.exp().sum(dim=-1, keepdim=True), group)
    return logits.sub_(total.log())


def _argmax(log_p: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
    """Global index of the largest of each row; the smallest index where several are equal."""
    value, index = log_p.max(dim=-1)
    if group is None or group.size() == 1:
        return index
    best = _all_reduce(value.clone(), group, dist.ReduceOp.MAX)
    candidate = torch.where(value == best, index + first, torch.iinfo(torch.int64).max)
    return _all_reduce(candidate, group, dist.ReduceOp.MIN)
