"""Triton kernels of head_softmax.py. One row of logits a program; the soft-max of both models in one reading of them."""

import triton
import triton.language as tl


@triton.jit
def row_statistics(
    student, teacher, labels, out,
    VOCABULARY: tl.constexpr, INVERSE_TEMPERATURE: tl.constexpr, TEACHER: tl.constexpr, REVERSE: tl.constexpr,
    LABELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill a row of `out`, fp32 [rows, COLUMNS], with what `head_softmax.Statistics` names, in its order.

    Exponentials are taken relative to the largest logit so far; sums are scaled down when a larger one comes.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * VOCABULARY
    teacher += row * VOCABULARY
    out += row * COLUMNS
    largest, total, total_t = float("-inf"), 0.0, 0.0
    largest_q, total_q, difference = float("-inf"), 0.0, 0.0
    for start in range(0, VOCABULARY, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < VOCABULARY
        x = tl.load(student + columns, mask=inside, other=float("-inf")).to(tl.float32)
        reached = tl.maximum(largest, tl.max(x))
        p = tl.exp(x - reached)
        total = total * tl.exp(largest - reached) + tl.sum(p)
        shrink = tl.exp((largest - reached) * INVERSE_TEMPERATURE)
        if INVERSE_TEMPERATURE != 1.0:
            p = tl.exp((x - reached) * INVERSE_TEMPERATURE)
        total_t = total_t * shrink + tl.sum(p)
        largest = reached
        if TEACHER:
            y = tl.load(teacher + columns, mask=inside, other=float("-inf")).to(tl.float32)
            reached_q = tl.maximum(largest_q, tl.max(y))
            q = tl.exp((y - reached_q) * INVERSE_TEMPERATURE)
            shrink_q = tl.exp((largest_q - reached_q) * INVERSE_TEMPERATURE)
            total_q = total_q * shrink_q + tl.sum(q)
            apart = tl.where(inside, (y - x) * INVERSE_TEMPERATURE, 0.0)
            if REVERSE:
                difference = difference * shrink - tl.sum(p * apart)
            else:
                difference = difference * shrink_q + tl.sum(q * apart)
            largest_q = reached_q
    tl.store(out, largest)
    tl.store(out + 1, total)
    tl.store(out + 2, total_t)
    tl.store(out + 3, largest_q)
    tl.store(out + 4, total_q)
    tl.store(out + 5, difference)
    if LABELS:
        label = tl.load(labels + row)
        mine = (label >= 0) & (label < VOCABULARY)
        tl.store(out + 6, tl.load(student + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def logit_gradient(
    student, teacher, labels, normalisers, out, scales,
    VOCABULARY: tl.constexpr, INVERSE_TEMPERATURE: tl.constexpr, TEACHER: tl.constexpr, REVERSE: tl.constexpr,
    LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the gradient with respect to the student's logits into `out`, of their shape, a block of a row a program.

    `normalisers` fp32 [rows, 5]: log of the sum of exponentials of the student's logits, of them over the temperature, of the
    teacher's over it; the row's KL; 1 where the row has a label anywhere, else 0. `scales` fp32 [2]: of KL and cross-entropy.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCABULARY
    student += row * VOCABULARY
    out += row * VOCABULARY
    normalisers += row * 5
    x = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.zeros([BLOCK], tl.float32)
    if TEACHER:
        kl_scale = tl.load(scales)
        y = tl.load(teacher + row * VOCABULARY + columns, mask=inside, other=0.0).to(tl.float32)
        log_p = x * INVERSE_TEMPERATURE - tl.load(normalisers + 1)
        log_q = y * INVERSE_TEMPERATURE - tl.load(normalisers + 2)
        if REVERSE:
            gradient = kl_scale * tl.exp(log_p) * (log_p - log_q - tl.load(normalisers + 3))
        else:
            gradient = kl_scale * (tl.exp(log_p) - tl.exp(log_q))
    if LABELS:
        label = tl.load(labels + row)
        p = tl.exp(x - tl.load(normalisers))
        gradient += tl.load(scales + 1) * tl.load(normalisers + 4) * (p - tl.where(columns == label, 1.0, 0.0))
    tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=inside)
