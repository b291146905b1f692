"""Plain-torch losses of the output head and their gradient from logits, over a vocabulary that ranks may share.

The definition of what kernels/head_softmax.py computes, and the only form of the KL to the teacher's top k. With K the k most
likely tokens of the teacher at a position, q and p the probabilities of teacher and student, Q and P their sums over K, that is
the KL of k + 1 classes, the last of which is every other token (head_loss.py has the formulas of the full KL):

    forward   KL = sum_K q log(q / p) + (1 - Q) log((1 - Q) / (1 - P))
              gradient with respect to the student's logits (over T): p - q in K, p - p (1 - Q) / (1 - P) elsewhere
    reverse   KL = sum_K p log(p / q) + (1 - P) log((1 - P) / (1 - Q))
              gradient: p (log(p / q) - KL) in K, p (log((1 - P) / (1 - Q)) - KL) elsewhere

Put q' = q in K, q' = p (1 - Q) / (1 - P) elsewhere: these are values and gradients of the full KL to a teacher q' held fixed.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def plain_head_softmax(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, first: int, weights: tuple[float, float | Tensor],
    reverse: bool, temperature: float, group: dist.ProcessGroup | None, wants_grad: bool, top_k: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute (sums of KL and cross-entropy over tokens, [2]; their weighted gradient): oracle of `head_softmax`.

    Args:
        logits: the student's, [n, V / TP], fp32 or wider; may be used up.
        teacher_logits: [n, V / TP] or None.
        labels, first, weights, reverse, temperature, group, wants_grad: as in head_loss.py; `first` is the number of this
            rank's first row.
        top_k: smaller than the vocabulary, or None.
    """
    kl_weight, ce_weight = weights
    sums, grad = logits.new_zeros(2), None
    log_p = _log_softmax(logits, group)
    if labels is not None:
        picked, grad = _cross_entropy(log_p, labels, first, ce_weight if wants_grad else 0.0)
        sums[1] -= _all_reduce(picked, group)
    if teacher_logits is not None:
        teacher_logits = teacher_logits.to(logits.dtype)
        if temperature != 1.0:  # log p up to a constant a token is as good as the logits
            log_p, teacher_logits = _log_softmax(log_p / temperature, group), teacher_logits / temperature
        log_q = _log_softmax(teacher_logits, group)
        if top_k is not None:
            log_q = _rest_like_student(log_p, log_q, top_k, group)
        kl, slope = _kl(log_p, log_q, reverse, group, wants_grad)
        sums[0] += kl * temperature**2
        if slope is not None:
            slope.mul_(kl_weight * temperature)
            grad = slope if grad is None else grad.add_(slope)
    return sums, grad


def _cross_entropy(log_p: Tensor, labels: Tensor, first: int, weight: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """(sum over tokens of log p[label], where this rank has it; the gradient weight (p - onehot), None for weight 0).

    Args:
        log_p: this rank's part of the vocabulary, [n, V / TP].
        labels: int64 [n] of the whole vocabulary; a negative one counts nothing.
        first: number of this rank's first row.
        weight: of the gradient; a tensor's value is not looked at, which would wait for the GPU.
    """
    picked, index, mine = _label_log_p(log_p, labels, first)
    picked = picked.sum()
    if not torch.is_tensor(weight) and not weight:
        return picked, None
    known, mine = (flag.to(log_p.dtype).unsqueeze(1) for flag in (labels >= 0, mine))
    return picked, log_p.exp().mul_(weight * known).scatter_add_(1, index, -weight * mine)


def _label_log_p(log_p: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log p[label] or 0 where another rank has it, [n]; its column on this rank, [n, 1]; whether it is here, bool [n])."""
    local = labels - first
    mine = (local >= 0) & (local < log_p.shape[1])
    index = local.clamp(0, log_p.shape[1] - 1).unsqueeze(1)
    return torch.where(mine, log_p.gather(1, index).squeeze(1), 0), index, mine


def token_losses(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, first: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Losses of each token: cross-entropy, correct, forward KL to the teacher, agreement with it, [4, n].

    "Correct" is 1 where the most likely token is the label; cross-entropy and it are 0 where the label is negative, the KL and
    agreement are 0 without a teacher.

    Args:
        logits: the student's, [n, V / TP], fp32 or wider; may be used up.
        teacher_logits: [n, V / TP] or None.
        labels: int64 [n] of the whole vocabulary.
        first: number of this rank's first row.
        group: ranks that share the vocabulary.
    """
    losses = logits.new_zeros(4, len(logits))
    log_p = _log_softmax(logits, group)
    losses[0] = -_all_reduce(_label_log_p(log_p, labels, first)[0], group)
    best = _argmax(log_p, first, group)
    losses[1] = best == labels
    if teacher_logits is not None:
        log_q = _log_softmax(teacher_logits.to(log_p.dtype), group)
        losses[2] = _all_reduce((log_q.exp() * (log_q - log_p)).sum(-1), group)
        losses[3] = best == _argmax(log_q, first, group)
    return losses


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


def _rest_like_student(log_p: Tensor, log_q: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """Logarithm of the module's q', [n, V / TP]: in K the teacher's; elsewhere the student's, scaled to the teacher's mass.

    Args:
        log_p, log_q: this rank's part of both log soft-maxes, [n, V / TP].
        k: smaller than the vocabulary.
        group: ranks that share the vocabulary.
    """
    kept = top_k_mask(log_q, k, group)
    # summed over the rest itself: 1 - P is nothing but rounding errors where the student is nearly sure
    rest = torch.stack([x.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True) for x in (log_q, log_p)])
    if group is not None and group.size() > 1:
        most = _all_reduce(rest.clone(), group, dist.ReduceOp.MAX)
        rest = _all_reduce((rest - most).exp(), group).log() + most
    return torch.where(kept, log_q, log_p + (rest[0] - rest[1]))


def top_k_mask(values: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """Mark this rank's share of each row's k largest values: bool [n, V / TP], exactly k a row over all ranks.

    Ranks compare their k largest. Which of equal values are taken is undefined, but the same on every rank.

    Args:
        values: this rank's part of each row, [n, V / TP].
        k: at most V.
        group: ranks that share the rows.
    """
    own, index = values.topk(min(k, values.shape[1]), dim=-1)
    kept = own.shape[1]
    chosen = torch.ones_like(index, dtype=torch.bool)
    if group is not None and group.size() > 1:
        own = torch.nn.functional.pad(own, (0, k - kept), value=-torch.inf)  # ranks may have different numbers of rows
        everyone = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(everyone, own, group=group)
        candidates = torch.cat(everyone, dim=-1)
        # stable, so that every rank puts equal ones into the same order
        best = candidates.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        chosen = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, best, True).chunk(group.size(), 1)[group.rank()]
        chosen = chosen[:, :kept]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, index, chosen)


def _all_reduce(value: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(value, op=op, group=group)
    return value


def _log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log soft-max over a vocabulary split over `group`: [n, V / TP]; two reductions of n numbers."""
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
