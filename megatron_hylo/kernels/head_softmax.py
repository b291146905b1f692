"""KL, cross-entropy and their gradient from two models' logits, without any other tensor of that size.

Plain torch needs a dozen passes over [tokens, vocabulary] in fp32; these two kernels read the logits twice, in the dtype that
the matrix products left them in, and write the gradient once, in the dtype of the products that take it, in the student's
place where that is the same. `distill/plain_head_softmax.py` has the plain form.

One reading gives each row's soft-max statistics and the mean difference of the logits, and with them the KL (at temperature T)

    forward   KL = E_q[(y - x) / T] - log sum exp(y / T) + log sum exp(x / T)        x student's, y teacher's logits
    reverse   KL = E_p[(x - y) / T] - log sum exp(x / T) + log sum exp(y / T)

With tensor parallelism the statistics of the ranks' parts of the vocabulary are reduced, seven numbers a token.
"""

import importlib
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hylo.kernels.registry import Unsupported, library_unsupported

MODULE = "megatron_hylo.kernels.triton_head_softmax"
BLOCK = 4096  # logits of a row that a program holds at a time


@dataclass
class Statistics:
    """Softmax statistics of each row's part of the vocabulary, fp32 [n], in the kernel's order."""

    largest: Tensor  # x
    total: Tensor  # sum exp(x - largest)
    total_t: Tensor  # sum exp((x - largest) / T)
    largest_q: Tensor  # y
    total_q: Tensor  # sum exp((y - largest_q) / T)
    difference: Tensor  # of logits over T, weighted with the exponentials of the KL's first distribution
    picked: Tensor  # x at the label, 0 where another rank has it


def unsupported(x: Tensor) -> Unsupported | None:
    """Why the Triton kernels cannot run on logits like x [n, V / TP]; None if they can (CUDA, not float64, Triton)."""
    return library_unsupported("triton", MODULE, x, "pip install triton")


def head_softmax(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    first: int,
    scales: Tensor,
    reverse: bool = False,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL and cross-entropy, summed over tokens, and the gradient of the logits.

    Args:
        logits: the student's, [n, V / TP], contiguous; overwritten where the gradient has its dtype.
        teacher_logits: [n, V / TP], or None for cross-entropy alone.
        labels: int64 [n], global; a negative one counts nothing; None for KL alone.
        first: global number of this rank's first row of the head.
        scales: fp32 [2], what the gradients of a token's KL (without T^2) and cross-entropy are multiplied with.
        reverse, temperature: of the KL.
        group: ranks that share the vocabulary.
        grad_dtype: of the gradient; None for none.

    Returns:
        fp32 the sum of the KL with its T^2 (0 without a teacher), the sum of the cross-entropies (0 without labels); the
        gradient [n, V / TP].
    """
    kernels, (n, vocabulary) = importlib.import_module(MODULE), logits.shape
    teacher, local = logits if teacher_logits is None else teacher_logits, labels if labels is None else labels - first
    flags = dict(
        VOCABULARY=vocabulary, INVERSE_TEMPERATURE=1.0 / temperature, TEACHER=teacher_logits is not None, REVERSE=reverse,
        LABELS=labels is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    columns = len(fields(Statistics))
    found = torch.zeros(n, columns, dtype=torch.float32, device=logits.device)
    index = logits if local is None else local
    kernels.row_statistics[(n,)](logits, teacher, index, found, COLUMNS=columns, **flags)
    s = _over_ranks(Statistics(*found.unbind(1)), reverse, temperature, group)
    normaliser = s.largest + s.total.log()
    normaliser_t, normaliser_q = s.largest / temperature + s.total_t.log(), s.largest_q / temperature + s.total_q.log()
    kl = torch.zeros_like(normaliser)
    if teacher_logits is not None:
        mean = s.difference / (s.total_t if reverse else s.total_q)
        kl = mean + (normaliser_q - normaliser_t if reverse else normaliser_t - normaliser_q)
    known = torch.zeros_like(kl) if labels is None else (labels >= 0).float()
    gradient = None
    if grad_dtype is not None:
        gradient = logits if logits.dtype == grad_dtype else torch.empty_like(logits, dtype=grad_dtype)
        rows = torch.stack([normaliser, normaliser_t, normaliser_q, kl, known], 1)
        grid = (n, -(-vocabulary // BLOCK))
        kernels.logit_gradient[grid](logits, teacher, index, rows, gradient, scales, **flags)
    return kl.sum() * temperature**2, ((normaliser - s.picked) * known).sum(), gradient


def _over_ranks(s: Statistics, reverse: bool, temperature: float, group: dist.ProcessGroup | None) -> Statistics:
    """Reduce statistics over the ranks that share the vocabulary: maxima first, then sums relative to them."""
    if group is None or group.size() == 1:
        return s
    largest = torch.stack([s.largest, s.largest_q])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shrink, shrink_t = (s.largest - largest[0]).exp(), ((s.largest - largest[0]) / temperature).exp()
    shrink_q = ((s.largest_q - largest[1]) / temperature).exp()
    difference = s.difference * (shrink_t if reverse else shrink_q)
    sums = torch.stack([s.total * shrink, s.total_t * shrink_t, s.total_q * shrink_q, difference, s.picked])
    dist.all_reduce(sums, group=group)
    total, total_t, total_q, difference, picked = sums
    return Statistics(largest[0], total, total_t, largest[1], total_q, difference, picked)
