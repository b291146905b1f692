"""Two ranks, half a vocabulary each, run the Triton kernels of head_softmax in Triton's interpreter; also a whole one alone.

Started by test_head_softmax.py. Prints one line a case: its name and the relative errors of KL, cross-entropy and gradient.
"""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hylo.distill.head_loss import _plain
from megatron_hylo.kernels.head_softmax import head_softmax

ROWS, VOCABULARY = 3, 9000  # more than two blocks of the kernel, and not whole ones
WEIGHTS = (0.7, 0.4)


def errors(
    dtype: torch.dtype, grad_dtype: torch.dtype, teacher: bool, labels: bool, reverse: bool, temperature: float,
    group: dist.ProcessGroup | None,
) -> list[float]:  # fmt: skip
    """Against the plain form in float64, over the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    x, y = (4 * torch.randn(ROWS, VOCABULARY, generator=generator).to(dtype) for _ in range(2))
    ids = torch.randint(VOCABULARY, (ROWS,), generator=generator) if labels else None
    if labels:
        ids[2] = -100
    weights = (WEIGHTS[0] if teacher else 0.0, WEIGHTS[1] if labels else 0.0)
    sums, gradient = _plain(
        x.double(), y.double() if teacher else None, ids, 0, weights, reverse, temperature, None, True, False
    )
    share = VOCABULARY // group.size() if group else VOCABULARY
    first = group.rank() * share if group else 0
    mine = x[:, first : first + share].contiguous()
    *found, slope = head_softmax(
        mine, y[:, first : first + share].contiguous() if teacher else None, ids, first, weights[0] * temperature, weights[1],
        reverse, temperature, group, grad_dtype,
    )  # fmt: skip
    assert slope.dtype == grad_dtype and (slope is mine) == (dtype == grad_dtype)

    def relative(ours: Tensor, theirs: Tensor) -> float:
        return float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30))

    return [relative(a, b) for a, b in zip(found, sums)] + [relative(slope, gradient[:, first : first + share])]


def main() -> None:
    """All cases."""
    dist.init_process_group("gloo")
    kinds, together = ((True, False), (True, True), (False, True)), dist.group.WORLD
    fp32, bf16 = torch.float32, torch.bfloat16
    for (dtype, grad_dtype), (teacher, labels), reverse, temperature, group in itertools.product(
        ((fp32, fp32), (bf16, bf16), (fp32, bf16)), kinds, (False, True), (1.0, 2.5), (None, together)
    ):
        everyone = [None, None]
        dist.all_gather_object(everyone, errors(dtype, grad_dtype, teacher, labels, reverse, temperature, group))
        if dist.get_rank() == 0:
            name = f"{dtype} {grad_dtype} {teacher=} {labels=} {reverse=} {temperature=} ranks={group.size() if group else 1}"
            print(f"CASE {name}", *map(max, *everyone), sep="|", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
