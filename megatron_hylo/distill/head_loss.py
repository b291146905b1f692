"""Losses of the output head without its logits: KL to a teacher and cross-entropy, in chunks of tokens.

For student hidden h [N, H_s], head W_s [V, H_s], teacher hidden [N, H_t], head W_t [V, H_t], with p = softmax:

    L = kl_weight * (1 / tokens) sum_n KL_n  +  ce_weight * (1 / labels) sum_n -log p_s[label_n]
    forward   KL = sum_v p_t (log p_t - log p_s)    gradient with respect to the student's logits: p_s - p_t
    reverse   KL = sum_v p_s (log p_s - log p_t)                                                   p_s (log p_s - log p_t - KL)

over the full vocabulary (forward, at temperature 1: HyLo stages 2 and 3; Zebra-Llama's trainer; reverse: MiniLLM,
arXiv:2306.08543). `tokens` counts those of which the KL is taken and `labels` those that have a label: of one call, or, where a
step makes several on several ranks, of all of them (`mean_counts`; Megatron-Core's `calculate_per_token_loss` has one divisor
for a whole loss, and these are two). With a temperature T the logits of both are divided by it and the KL is multiplied by T^2,
so that its gradients keep their size (Hinton et al., arXiv:1503.02531); cross-entropy stays at temperature 1. With a top k, the
teacher's k most likely tokens of each position keep their own terms and all others are one class (plain_head_softmax.py). Both
gradients are made in the forward pass, a chunk at a time: [chunk, V] is the size of the largest tensor that ever exists.
With tensor parallelism the vocabulary is split over ranks; they exchange soft-max statistics, and for a top k the teacher's k
largest log-probabilities of each, never whole logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train_settings import KLSettings
from megatron_hylo.data.packed import IGNORED
from megatron_hylo.distill.head_rows import rows_to_use, teacher_rows
from megatron_hylo.distill.plain_head_softmax import plain_head_softmax, token_losses
from megatron_hylo.kernels.head_softmax import head_softmax, unsupported
from megatron_hylo.kernels.registry import Unsupported, select
from megatron_hylo.models.hylo_model import HyloModel

DEFAULTS = KLSettings()


@dataclass
class HeadLoss:
    """Means over tokens. `loss` carries the gradient; the others are for reports (None where not asked for).

    `kl` is as the loss counts it: in its direction, at its temperature with the T^2, of its top k.
    """

    loss: Tensor
    kl: Tensor | None
    cross_entropy: Tensor | None


def model_head_loss(
    student: HyloModel,
    hidden: Tensor,
    labels: Tensor | None = None,
    teacher: Any = None,
    teacher_hidden: Tensor | None = None,
    settings: KLSettings = DEFAULTS,
    *,
    chunk_tokens: int = 1024,
    token_mask: Tensor | None = None,
    counts: Tensor | None = None,
    capacity: int | None = None,
) -> HeadLoss:
    """Compute `linear_head_loss` of a model's hidden states under any tensor and sequence parallelism.

    Args:
        student: gives the head's weight.
        hidden: the student's output, [sequence (/ TP), batch, H_s].
        labels: int64 [batch, sequence]; needed where cross-entropy is wanted.
        teacher, teacher_hidden: the frozen teacher (a model, or a `StoredTeacher`) and its output; both or neither.
        settings, chunk_tokens, counts, capacity: see `linear_head_loss`.
        token_mask: [batch, sequence]; see `linear_head_loss`.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    own, weight, theirs, teacher_weight, vocabulary = _head_inputs(student, hidden, teacher, teacher_hidden, group)
    return linear_head_loss(
        own,
        weight,
        labels.transpose(0, 1).flatten() if labels is not None else None,
        theirs,
        teacher_weight,
        settings,
        chunk_tokens=chunk_tokens,
        group=group,
        token_mask=token_mask.transpose(0, 1).flatten() if token_mask is not None else None,
        counts=counts,
        vocabulary=vocabulary,
        capacity=capacity,
    )


@torch.no_grad()
def model_token_losses(
    model: HyloModel,
    hidden: Tensor,
    labels: Tensor,
    teacher: Any = None,
    teacher_hidden: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Compute the losses of each token under any tensor and sequence parallelism, for evaluations.

    Args:
        model, hidden, labels, teacher, teacher_hidden, chunk_tokens: see `model_head_loss`; labels are needed.

    Returns:
        fp32 or wider [4, batch, sequence]: cross-entropy, correct, KL and agreement, see `token_losses`.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    own, weight, theirs, teacher_weight, vocabulary = _head_inputs(model, hidden, teacher, teacher_hidden, group)
    first = group.rank() * len(weight)
    rows = rows_to_use(weight, teacher_weight, first, vocabulary)
    flat, wide = labels.transpose(0, 1).flatten(), torch.promote_types(hidden.dtype, torch.float32)
    found = []
    for start in range(0, len(flat), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits, teacher_logits = (
            _logits(x[chunk], w[:rows], wide).to(wide) if x is not None and w is not None else None
            for x, w in ((own, weight), (theirs, teacher_weight))
        )
        assert logits is not None, "the student has hidden states"
        found.append(token_losses(logits, teacher_logits, flat[chunk], first, group))
    return torch.cat(found, 1).unflatten(1, (labels.shape[1], labels.shape[0])).transpose(1, 2)


def mean_counts(labels: Sequence[Tensor], group: dist.ProcessGroup, masks: Sequence[Tensor | None] | None = None) -> Tensor:
    """Return the `counts` of `linear_head_loss` that make the mean over a step's calls the loss of its global batch.

    They are means over the calls of all ranks: Megatron-Core averages losses and gradients over micro-batches and ranks, and
    (1 / calls) sum_i sum_i / (total / calls) = sum_i sum_i / total. The number of labels is on the device, so that a CUDA graph
    counts those of the batch that it is replayed with.

    Args:
        labels: int64 of each of this rank's micro-batches, of any shape; negative ones are masked. As many on every rank.
        group: ranks that share the global batch, data- and context-parallel ones.
        masks: of each micro-batch the tokens that count, bool in the labels' shape; None: all.

    Returns:
        float64 [2]: tokens, labels.
    """
    kept = masks if masks is not None else [None] * len(labels)
    tokens: Any = sum(x.numel() if mask is None else mask.sum() for x, mask in zip(labels, kept))
    found: Any = sum(((x >= 0) if mask is None else (x >= 0) & mask).sum() for x, mask in zip(labels, kept))
    total = found.double()
    total = torch.stack([torch.zeros_like(total) + tokens, total])
    dist.all_reduce(total, group=group)
    return total / (len(labels) * group.size())


def _head_inputs(
    student: HyloModel, hidden: Tensor, teacher: Any, teacher_hidden: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """Gather all tokens of student and teacher, with this rank's rows of their heads.

    Returns:
        (hidden states [N, H_s], head [V / TP, H_s], the teacher's hidden states and head or None, tokens that both know).
    """
    own, vocabulary = _full_tokens(hidden, student.config.sequence_parallel, group), student.config.hylo.vocab_size
    if teacher is None:
        return own.flatten(0, 1), student.head_weight(), None, None, vocabulary
    assert teacher_hidden is not None, "a teacher comes with its hidden states"
    with torch.no_grad():
        theirs = _full_tokens(teacher_hidden, teacher.config.sequence_parallel, group).flatten(0, 1)
    known = min(vocabulary, teacher.config.hylo.vocab_size)
    return own.flatten(0, 1), student.head_weight(), theirs, teacher_rows(student, teacher, group), known


def _full_tokens(hidden: Tensor, sequence_parallel: bool, group: dist.ProcessGroup) -> Tensor:
    """Gather all tokens on every rank; the backward pass sums the ranks' partial gradients."""
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(hidden, group=group)


def linear_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    settings: KLSettings = DEFAULTS,
    *,
    chunk_tokens: int = 1024,
    group: dist.ProcessGroup | None = None,
    token_mask: Tensor | None = None,
    counts: Tensor | None = None,
    vocabulary: int | None = None,
    capacity: int | None = None,
) -> HeadLoss:
    """Compute KL and cross-entropy of a linear head (formulas above), with the soft-max in fp32 whatever the inputs' dtype.

    Args:
        hidden: [N, H_s].
        weight: this rank's rows [V / TP, H_s]; the same number on every rank.
        labels: int64 [N], global token ids; a negative one has no cross-entropy and is not counted; without them none.
        teacher_hidden: [N, H_t], no gradient.
        teacher_weight: the rows for the same tokens, [at most V / TP, H_t]; the student's rows beyond them are padding, which
            neither model's soft-max then has, and get no gradient.
        settings: weights, and direction, temperature and top k of the KL. The KL's are ignored without a teacher, the weight of
            the cross-entropy without labels; the loss without a teacher is the cross-entropy, whatever the weights are. With a
            top k plain torch runs, since the Triton kernels have none; one as large as the vocabulary is the full KL.
        chunk_tokens: tokens whose logits exist at a time.
        group: ranks that share the vocabulary; gradients with respect to `hidden` are this rank's partial sums.
        token_mask: bool or 0/1 [N], the same on all ranks of `group`: 1 where a token counts. The others are left out before
            there are logits: they cost nothing and have neither loss nor gradient, whatever they hold, and are not counted.
            Shapes depend on the mask, which waits for the GPU, unless there is a `capacity`.
        counts: float64 [2], what sums are divided by: those of the KL, and that of the cross-entropy. None:
            by the unmasked tokens and by the labels of this call. Where one is 0 so is the sum, and the mean with it.
        vocabulary: tokens of the whole vocabulary where the ranks' rows are more: those after the first `vocabulary` of all
            ranks are padding, which no soft-max has, and which gets no gradient.
        capacity: number of tokens that are computed whatever the mask says, so that a CUDA graph can capture it; at least as
            many as count. None: as many as count.

    Raises:
        ConfigError: the heads' vocabularies differ, or there is neither teacher nor label.
        IndexError: the mask's shape is not [N].
        RuntimeError: the Triton kernels are forced but cannot run, as with kl_top_k.
    """
    if teacher_weight is None and labels is None:
        raise ConfigError("a head loss needs a teacher or labels")
    if teacher_weight is not None and teacher_weight.shape[0] > weight.shape[0]:
        raise ConfigError(
            f"the teacher's vocabulary has {teacher_weight.shape[0]} rows a rank, the student's {weight.shape[0]}; give those "
            f"of its tokens"
        )
    kl_weight, ce_weight = (settings.kl_weight, settings.ce_weight) if teacher_weight is not None else (0.0, 1.0)
    if labels is None:
        ce_weight = 0.0
    if vocabulary is None:
        vocabulary = weight.shape[0] * (group.size() if group is not None else 1)
    top_k = settings.kl_top_k
    if teacher_weight is None or (top_k is not None and top_k >= vocabulary):
        top_k = None
    settings = replace(settings, kl_weight=kl_weight, ce_weight=ce_weight, kl_top_k=top_k)
    if token_mask is not None:
        if token_mask.shape != hidden.shape[:1]:
            raise IndexError(f"the shape of the mask {tuple(token_mask.shape)} is not that of {len(hidden)} tokens")
        if counts is None:
            counts = token_mask.sum().double().expand(2).clone()
            if labels is not None:
                counts[1] = ((labels >= 0) & token_mask.bool()).sum()
        hidden, labels, teacher_hidden = _kept_tokens(token_mask.bool(), capacity, hidden, labels, teacher_hidden)
    if counts is None:
        counts = torch.full((2,), len(hidden), dtype=torch.float64, device=hidden.device)
        if labels is not None:
            counts[1] = (labels >= 0).sum()
    counts = counts + (counts == 0)  # of nothing the sum is 0
    loss, sums = _LinearHeadLoss.apply(
        hidden, weight, labels, teacher_hidden, teacher_weight, settings, counts, chunk_tokens, group, vocabulary
    )
    kl, cross_entropy = sums / counts.to(sums.dtype)
    return HeadLoss(loss, kl if teacher_weight is not None else None, cross_entropy if labels is not None else None)


def _kept_tokens(
    kept: Tensor, capacity: int | None, hidden: Tensor, labels: Tensor | None, teacher_hidden: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden states, labels and the teacher's hidden states of the tokens that count, in their order.

    With a capacity there are that many: those that do not count have no label and zeros as hidden states of both models, so
    that their KL and its gradient are 0.
    """
    if capacity is None:
        labels, teacher_hidden = (x if x is None else x[kept] for x in (labels, teacher_hidden))
        return hidden[kept], labels, teacher_hidden
    if capacity < len(kept):
        # the n-th that counts goes to place n, all others behind the last place
        places = (kept.cumsum(0) - 1).masked_fill(~kept, capacity).clamp(max=capacity)
        numbers = torch.arange(len(kept), device=kept.device)
        chosen = torch.zeros(capacity + 1, dtype=torch.int64, device=kept.device).scatter_(0, places, numbers)[:capacity]
        kept = torch.arange(capacity, device=kept.device) < kept.sum()
        hidden = hidden.index_select(0, chosen)
        labels, teacher_hidden = (x if x is None else x.index_select(0, chosen) for x in (labels, teacher_hidden))
    left_out = ~kept
    column = left_out.unsqueeze(1)
    return (
        hidden.masked_fill(column, 0),
        labels if labels is None else labels.masked_fill(left_out, IGNORED),
        teacher_hidden if teacher_hidden is None else teacher_hidden.masked_fill(column, 0),
    )


class _LinearHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, teacher_hidden, teacher_weight, settings, counts, chunk_tokens, group, vocabulary):
        """Return the loss [] and its sums [2] (KL, cross-entropy) of this rank's tokens; gradients are made here, by chunk.

        Args:
            ctx: keeps the gradients.
            hidden, teacher_hidden: [n, H] of student and teacher; the latter may be None.
            weight, teacher_weight: this rank's rows of the heads, [V / TP, H].
            labels: int64 [n], or None.
            settings: weights, direction and temperature.
            counts: the first two are what KL and cross-entropy are divided by, in tokens.
            chunk_tokens: tokens whose logits are made at a time.
            group: ranks that share the vocabulary, or None.
            vocabulary: its size without padding.
        """
        kl_weight, ce_weight, temperature, top_k = (
            settings.kl_weight, settings.ce_weight, settings.kl_temperature, settings.kl_top_k,
        )  # fmt: skip
        reverse = settings.kl_direction == "reverse"
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wants_grad = wants_hidden or wants_weight
        n, compute = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(2, dtype=compute, device=hidden.device)  # KL, cross-entropy
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=compute, device=weight.device) if wants_weight else None
        first = group.rank() * weight.shape[0] if group is not None else 0
        rows = rows_to_use(weight, teacher_weight, first, vocabulary)
        teacher_weight = teacher_weight[:rows] if teacher_weight is not None else None
        weight, dtype = weight[:rows], weight.dtype
        # one divisor for all, so that as many labels as tokens are divided as one mean
        divisor = counts[0 if teacher_weight is not None else 1]
        ce_share = ce_weight * (divisor / counts[1]).to(compute) if ce_weight else 0.0
        scales = torch.stack([torch.full_like(divisor, kl_weight * temperature), torch.full_like(divisor, ce_weight)])
        scales = (scales / torch.stack([divisor, counts[1]])).float()
        divisor = divisor.to(compute)
        reason = unsupported(hidden) if top_k is None else Unsupported("the Triton kernels have no KL to the teacher's top k")
        fused = select("head_softmax", "triton", reason) == "triton"
        for start in range(0, n, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, n))
            logits = _logits(hidden[chunk], weight, compute)
            teacher_logits = _logits(teacher_hidden[chunk], teacher_weight, compute) if teacher_weight is not None else None
            own_labels = labels[chunk] if labels is not None else None
            if fused:
                kl, cross_entropy, grad = head_softmax(
                    logits, teacher_logits, own_labels, first, scales, reverse, temperature, group,
                    weight.dtype if wants_grad else None,
                )  # fmt: skip
                sums += torch.stack([kl, cross_entropy])
            else:
                found, grad = plain_head_softmax(
                    logits.to(compute), teacher_logits, own_labels, first, (kl_weight, ce_share), reverse, temperature, group,
                    wants_grad, top_k,
                )  # fmt: skip
                sums += found
                grad = grad if grad is None else grad.div_(divisor).to(weight.dtype)
            del logits, teacher_logits
            if grad is None:
                continue
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight[:rows], grad.t(), hidden[chunk])
        ctx.grads = grad_hidden, grad_weight.to(dtype) if grad_weight is not None else None
        loss = (kl_weight * sums[0] + ce_share * sums[1]) / divisor
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, grad_loss, _):
        """Multiply the gradients of `hidden` and `weight` by the loss's, in place, and return them; the sums have none."""
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        scale = lambda g: g if g is None else g.mul_(grad_loss.to(g.dtype))  # noqa: E731
        return scale(grad_hidden), scale(grad_weight), *[None] * 8


def _logits(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    """Logits [n, V / TP], on a GPU in the dtype of its sums: bf16 rounds a logit of 10 by 0.03, which late gradients show."""
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, weight.t(), out_dtype=wide)
    return hidden @ weight.t()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`, which may be wider than both: on a GPU in the product's own kernel."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += (a @ b).to(total.dtype)
