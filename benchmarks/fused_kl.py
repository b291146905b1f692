"""KL between two heads without their logits, forward and backward: ours, fla's, Liger's and the plain way, in one run.

    python benchmarks/fused_kl.py                      # teacher 8B, student 1B, Llama's and Qwen's vocabularies
    python benchmarks/fused_kl.py --tokens 64 --vocabularies [1000] --chunks [16]     # on a CPU: plain torch alone
    torchrun --nproc-per-node 2 benchmarks/fused_kl.py      # ours with the vocabulary over the ranks, against one of them

The floor is the matrix products, 2 N V (3 H_student + H_teacher) FLOPs, at the rate of PRODUCT_RATE (an 8192-cubed bf16
product on an H100). Errors are those of 1,024 tokens against float64. Peers that are not installed are left out, and said so.
Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import importlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import auto_cli
from report import device_name, free_memory, report
from torch import Tensor

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.distill.head_loss import linear_head_loss
from megatron_hylo.kernels.registry import in_use

PRODUCT_RATE = 790e12  # FLOP/s
COLUMNS = ("vocabulary", "implementation", "ms", "TFLOP/s", "x the floor", "extra GiB", "loss", "hidden", "weight")
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # student's hidden and head, teacher's


def naive(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """All logits at once, soft-max in fp32."""
    log_p = F.log_softmax((hidden @ weight.t()).float(), -1)
    log_q = F.log_softmax((teacher_hidden @ teacher_weight.t()).float(), -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def implementations(chunks: list[int]) -> dict[str, Loss | str]:
    """Name -> the loss, or why it is left out."""
    found: dict[str, Loss | str] = {}
    for chunk in chunks:
        found[f"ours, chunks of {chunk:,}"] = lambda h, w, th, tw, chunk=chunk: (
            linear_head_loss(h, w, None, th, tw, chunk_tokens=chunk).loss
        )
    try:
        fla = importlib.import_module("fla.modules.fused_kl_div").FusedKLDivLoss()
        found["fla FusedKLDivLoss"] = lambda h, w, th, tw: fla(h, th, w, tw)
    except ImportError as error:
        found["fla FusedKLDivLoss"] = str(error)
    try:  # jsd_beta 0: the forward KL
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0)
        found["Liger fused linear JSD, beta 0"] = lambda h, w, th, tw: liger(h, w, th, tw, None)
    except ImportError as error:
        found["Liger fused linear JSD, beta 0"] = str(error)
    return found | {"naive": naive}


def main(
    tokens: int = 16_384,
    vocabularies: list[int] = [128_256, 151_936],  # noqa: B006  jsonargparse shows it
    student_width: int = 2048,
    teacher_width: int = 4096,
    chunks: list[int] = [1024, 4096],  # noqa: B006
    repeats: int = 5,
    results: Path = Path("benchmarks/results/fused_kl"),
    commit: str = "",
) -> None:
    """Time every implementation, measure its memory and its errors.

    Args:
        tokens: N.
        vocabularies: V.
        student_width, teacher_width: H of each.
        chunks: tokens whose logits ours holds at a time.
        repeats: timed passes, after two that are not.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    if "WORLD_SIZE" in os.environ:
        return over_ranks(tokens, vocabularies, (student_width, teacher_width), chunks, repeats, results, commit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, left_out = [], {}
    for vocabulary in vocabularies:
        inputs = _inputs(tokens, vocabulary, student_width, teacher_width, device)
        few = [x[:1024] if i % 2 == 0 else x for i, x in enumerate(inputs)]
        truth = _run(naive, [x.double() for x in few])
        floor = 2 * tokens * vocabulary * (3 * student_width + teacher_width) / PRODUCT_RATE
        for name, loss in implementations(chunks).items():
            if isinstance(loss, str):
                left_out[name] = loss
                continue
            try:
                errors = [_relative(mine, theirs) for mine, theirs in zip(_run(loss, few), truth)]
                seconds, extra = _measure(loss, inputs, repeats)
            except (torch.OutOfMemoryError, RuntimeError) as error:  # Triton's needs a GPU, naive much memory
                left_out[f"{name}, {vocabulary:,}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                continue
            finally:
                free_memory()
            rows.append(dict(vocabulary=vocabulary, implementation=name, seconds=seconds, floor=floor, extra_gib=extra / 2**30,
                             errors=errors))  # fmt: skip
    _show(rows, left_out, (tokens, student_width, teacher_width), results, commit)


def over_ranks(
    tokens: int, vocabularies: list[int], widths: tuple[int, int], chunks: list[int], repeats: int, results: Path, commit: str
) -> None:
    """Each rank has its rows of both heads; rank 0 also has all of them, alone, and compares."""
    cuda, rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks, rows = dist.get_world_size(), []
    for vocabulary, chunk in itertools.product(vocabularies, chunks):
        inputs = _inputs(tokens, vocabulary, *widths, torch.device("cuda" if cuda else "cpu"))
        own = [x if i % 2 == 0 else x.chunk(ranks)[rank] for i, x in enumerate(inputs)]

        def loss(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
            return linear_head_loss(h, w, None, th, tw, chunk_tokens=chunk, group=group).loss  # noqa: B023  called here

        def divided(*parts: Tensor) -> Tensor:
            return loss(*parts, group=dist.group.WORLD)

        value, hidden, weight = _run(divided, own)
        dist.all_reduce(hidden)
        one = _run(loss, inputs)
        errors = [
            _relative(mine, theirs) for mine, theirs in zip((value, hidden, weight), (*one[:2], one[2].chunk(ranks)[rank]))
        ]
        alone, together = (_measure(f, x, repeats)[0] for f, x in ((loss, inputs), (divided, own)))
        rows.append((f"{vocabulary:,}", f"{chunk:,}", f"{1e3 * alone:.1f}", f"{1e3 * together:.1f}", f"{alone / together:.2f}",
                     *(f"{error:.1e}" for error in errors)))  # fmt: skip
        free_memory()
    if rank == 0:
        columns = ("vocabulary", "chunk", "one rank, ms", f"{ranks} ranks, ms", "speed-up", "loss", "hidden", "weight")
        intro = f"{tokens:,} tokens, widths {widths}. Errors: of loss and gradients, relative by norm, against one rank."
        how = f"{ranks} x {device_name()}, commit {commit}, {in_use()}"
        report(results, "KL of two heads, the vocabulary over ranks", [intro], columns, rows, how)
        print(json.dumps({"benchmark": "fused_kl", "device": device_name(), "ranks": ranks, "columns": columns, "rows": rows}))
    dist.barrier()
    dist.destroy_process_group()


def _inputs(tokens: int, vocabulary: int, student: int, teacher: int, device: torch.device) -> list[Tensor]:
    """bf16 (fp32 on a CPU), logits of a spread of about 3."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    found = []
    for width in (student, teacher):
        found += [torch.randn(tokens, width, device=device), torch.randn(vocabulary, width, device=device) * 3 * width**-0.5]
    return [x.to(dtype) for x in found]


def _run(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    """The loss and the gradients of the student's hidden states and head."""
    hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
    value = loss(hidden, weight, *inputs[2:])
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def _measure(loss: Loss, inputs: list[Tensor], repeats: int) -> tuple[float, int]:
    """(median seconds, bytes beyond the inputs and both gradients at the fullest)."""
    cuda, times = inputs[0].is_cuda, []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(2 + repeats):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        _run(loss, inputs)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    outputs = sum(x.numel() * x.element_size() for x in inputs[:2])
    extra = torch.cuda.max_memory_allocated() - before - outputs if cuda else 0
    return statistics.median(times[2:]), extra


def _relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


def _show(
    rows: list[dict[str, Any]], left_out: dict[str, str], shape: tuple[int, int, int], results: Path, commit: str
) -> None:
    cells = [
        (f"{r['vocabulary']:,}", r["implementation"], f"{1e3 * r['seconds']:.1f}",
         f"{r['floor'] * PRODUCT_RATE / r['seconds'] / 1e12:.0f}", f"{r['seconds'] / r['floor']:.2f}", f"{r['extra_gib']:.2f}",
         *(f"{error:.1e}" for error in r["errors"]))
        for r in rows
    ]  # fmt: skip
    tokens, student, teacher = shape
    intro = [
        f"{tokens:,} tokens, student {student} wide, teacher {teacher}, forward KL, gradients of the student's hidden states "
        f"and head. Extra: beyond inputs and gradients. Errors: of loss and gradients, relative by norm, 1,024 tokens, against "
        f"float64.",
        *(f"Left out: {name} ({why})" for name, why in left_out.items()),
    ]
    report(results, "KL of two heads", intro, COLUMNS, cells, f"{device_name()}, commit {commit}, {in_use()}")
    for line in intro[1:]:
        print(line)
    print(json.dumps({"benchmark": "fused_kl", "device": device_name(), "shape": shape, "rows": rows, "left_out": left_out}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
