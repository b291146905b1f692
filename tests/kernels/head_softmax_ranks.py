"""Two ranks, half a vocabulary each, run the Triton kernels of head_softmax in Triton's interpreter; also a whole one alone.

Started by test_head_softmax.py. Prints one line a case: its name and the relative errors of KL, cross-entropy and gradient.
The last cases are the whole head loss with masked tokens.
"""

import itertools
import multiprocessing
import sys
import tempfile
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hylo.config.train import KLSettings
from megatron_hylo.distill import head_loss
from megatron_hylo.distill.plain_head_softmax import plain_head_softmax
from megatron_hylo.kernels.head_softmax import head_softmax
from megatron_hylo.kernels.registry import in_use
from tests.distill.test_head_loss import make_inputs, reference

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
    sums, gradient = plain_head_softmax(
        x.double(), y.double() if teacher else None, ids, 0, weights, reverse, temperature, None, True
    )
    share = VOCABULARY // group.size() if group else VOCABULARY
    first = group.rank() * share if group else 0
    mine = x[:, first : first + share].contiguous()
    *found, slope = head_softmax(
        mine, y[:, first : first + share].contiguous() if teacher else None, ids, first,
        torch.tensor([weights[0] * temperature, weights[1]]), reverse, temperature, group, grad_dtype,
    )  # fmt: skip
    assert slope.dtype == grad_dtype and (slope is mine) == (dtype == grad_dtype)
    return [_relative(a, b) for a, b in zip(found, sums)] + [_relative(slope, gradient[:, first : first + share])]


def masked_errors(reverse: bool, group: dist.ProcessGroup | None) -> list[float]:
    """Errors of the head loss over five tokens, of which two are masked, against whole logits in float64."""
    torch.manual_seed(0)
    inputs, mask = make_inputs(n=5, vocab=VOCABULARY), torch.tensor([1, 0, 1, 1, 0])
    direction, first, share = "reverse" if reverse else "forward", 0, VOCABULARY
    truth = reference(inputs, *WEIGHTS, direction, 2.0, mask=mask)
    if group is not None:
        share = VOCABULARY // group.size()
        first = group.rank() * share
        for name in ("weight", "teacher_weight"):
            inputs[name] = inputs[name].detach()[first : first + share].requires_grad_(name == "weight")
    with patch.object(head_loss, "unsupported", lambda _: None):  # in the interpreter there is none
        result = head_loss.linear_head_loss(
            **inputs,
            chunk_tokens=2,
            group=group,
            token_mask=mask,
            settings=KLSettings(kl_weight=WEIGHTS[0], ce_weight=WEIGHTS[1], kl_direction=direction, kl_temperature=2.0),
        )
    assert in_use()["head_softmax"] == "triton"
    result.loss.backward()
    if group is not None:
        dist.all_reduce(inputs["hidden"].grad, group=group)
    gradient = max(
        _relative(inputs["hidden"].grad, truth["hidden"]),
        _relative(inputs["weight"].grad, truth["weight"][first : first + share]),
    )
    return [_relative(getattr(result, name), truth[name]) for name in ("kl", "cross_entropy")] + [gradient]


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30))


def run_rank(rank: int, store: str) -> None:
    """Run all cases on one rank."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    kinds, together = ((True, False), (True, True), (False, True)), dist.group.WORLD
    fp32, bf16 = torch.float32, torch.bfloat16
    for (dtype, grad_dtype), (teacher, labels), reverse, temperature, group in itertools.product(
        ((fp32, fp32), (bf16, bf16), (fp32, bf16)), kinds, (False, True), (1.0, 2.5), (None, together)
    ):
        name = f"{dtype} {grad_dtype} {teacher=} {labels=} {reverse=} {temperature=} ranks={group.size() if group else 1}"
        _show(name, errors(dtype, grad_dtype, teacher, labels, reverse, temperature, group))
    for reverse, group in itertools.product((False, True), (None, together)):
        _show(f"masked {reverse=} ranks={group.size() if group else 1}", masked_errors(reverse, group))
    dist.destroy_process_group()


def _show(name: str, mine: list[float]) -> None:
    """The worst of both ranks."""
    everyone = [None, None]
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print(f"CASE {name}", *map(max, *everyone), sep="|", flush=True)


def main() -> None:
    """Fork the ranks, so that torch and Triton are imported once."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=run_rank, args=(rank, f"{folder}/store")) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
