"""Attention with its gradients, as layers that train compute it: FlashAttention-4 against cuDNN, MLA's heads among them.

    python benchmarks/attention_training.py                             # 64K and 32K tokens, a minute on an H200
    python benchmarks/attention_training.py --tokens [256] --repeats 1  # small, on a CPU, where all is plain torch

Causal, bf16, through `megatron_hylo.kernels.attention`, medians over repeats, the kernels in turn. Errors are relative, by
norm, against float64 on the same numbers: the output and the gradients of one group of heads at CHECKED tokens. Copies that a
kernel needs (repeated keys and values) are in its time. Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from attention_forward import inputs
from jsonargparse import auto_cli
from report import device_name, free_memory, report, seconds
from torch import Tensor

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.registry import override

SHAPES = (  # query heads, KV heads, width of queries and keys, of values; whose
    (32, 8, 96, 64, "MLA"), (32, 8, 64, 64, "MLA, attention of a 1B"), (32, 8, 128, 128, "attention of an 8B"),
)  # fmt: skip
KERNELS = ("cudnn", "fa4")
CHECKED = 2048
COLUMNS = (
    "heads", "channels", "tokens", "kernel", "forward ms", "forward and backward ms", "TFLOP/s", "x cuDNN", "first call s",
    "error o", "error dq", "error dk", "error dv",
)  # fmt: skip


def main(
    tokens: tuple[int, ...] = (65_536, 32_768),
    repeats: int = 5,
    results: Path = Path("benchmarks/results/attention_training"),
    commit: str = "",
) -> None:
    """Measure all shapes.

    Args:
        tokens: lengths.
        repeats: timed passes of each kernel, after one that is not.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = KERNELS if device.type == "cuda" else ("torch",)
    generator = torch.Generator(device).manual_seed(0)
    rows = []
    for length in tokens:
        for heads, groups, width, values, whose in SHAPES:
            flops = heads * (4 * width + 3 * values) * length**2  # half of all pairs: 2 products forward, 5 backward
            about = dict(whose=whose, heads=f"{heads}/{groups}", channels=f"{width}, {values}", tokens=length)
            found = measure(kernels, inputs(length, heads, groups, width, values, 1.0, generator), repeats)
            small = inputs(min(length, CHECKED), heads, groups, width, values, 1.0, generator)
            for name, times in found.items():
                row = about | {"kernel": name}
                if isinstance(times, str):
                    row |= {"failed": times}
                else:
                    row |= times | {"tflops": flops / times["both"] / 1e12, "errors": errors(name, small)}
                    row |= {"ratio": found["cudnn"]["both"] / times["both"] if isinstance(found.get("cudnn"), dict) else 1.0}
                rows.append(row)
                print(json.dumps(row), flush=True)
            free_memory()
    cells = [
        (f"{r['heads']} ({r['whose']})", r["channels"], f"{r['tokens']:,}", r["kernel"],
         *((*[""] * 5, r["failed"], "", "", "") if "failed" in r else
           (f"{1e3 * r['forward']:.2f}", f"{1e3 * r['both']:.1f}", f"{r['tflops']:.0f}", f"{r['ratio']:.2f}",
            f"{r['first']:.1f}", *(f"{error:.1e}" for error in r["errors"]))))
        for r in rows
    ]  # fmt: skip
    intro = ["Causal, bf16, batch 1; channels of queries and keys, of values; TFLOP/s of forward and backward together."]
    report(results, "Attention with its gradients", intro, COLUMNS, cells, f"{device_name()}, commit {commit or 'not given'}")
    print(json.dumps({"benchmark": "attention_training", "device": device_name(), "rows": rows}))


def measure(kernels: tuple[str, ...], tensors: list[Tensor], repeats: int) -> dict[str, dict[str, float] | str]:
    """Time each kernel's forward pass without a gradient, and both passes.

    Args:
        kernels: implementations of the registry's `attention`.
        tensors: q [1, t, hq, d], k [1, t, hkv, d] and v [1, t, hkv, dv].
        repeats: timed calls.

    Returns:
        By kernel the median seconds `forward` and `both`, and those of its `first` call of both, in which kernels are compiled;
        or why it cannot run.
    """
    leaves = [x.requires_grad_() for x in tensors]
    upstream = torch.randn_like(tensors[0][..., : tensors[2].shape[-1]])
    scale = leaves[0].shape[-1] ** -0.5

    def both() -> None:
        torch.autograd.grad(attention(*leaves, scale), leaves, upstream)

    @torch.no_grad()
    def forward() -> None:
        attention(*leaves, scale)

    calls: dict[str, Callable[[], None]] = {"forward": forward, "both": both}
    times: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, float] | str] = {}
    for name in kernels:
        try:
            with override("attention", name):
                times[name] = {"first": [seconds(both)], "forward": [], "both": []}
                forward()
        except RuntimeError as error:
            times.pop(name, None)
            found[name] = str(error).splitlines()[0]
    for _ in range(repeats):
        for name, own in times.items():
            with override("attention", name):
                for what, call in calls.items():
                    own[what].append(seconds(call))
    return found | {name: {what: statistics.median(x) for what, x in own.items()} for name, own in times.items()}


def errors(kernel: str, tensors: list[Tensor]) -> list[float]:
    """Relative errors of the output and of the gradients of q, k and v for the first group of heads, against float64."""
    q, k, v = tensors
    per_group = q.shape[2] // k.shape[2]
    generator = torch.Generator(q.device).manual_seed(1)
    upstream = torch.randn(*q.shape[:3], v.shape[-1], generator=generator, device=q.device).bfloat16()
    given = [x.detach().requires_grad_() for x in tensors]
    with override("attention", kernel):
        ours = attention(*given, q.shape[-1] ** -0.5)
    exact = [x.detach().double().requires_grad_() for x in (q[:, :, :per_group], k[:, :, :1], v[:, :, :1])]
    scores = torch.einsum("bthd,bsgd->bhts", exact[0], exact[1]) * q.shape[-1] ** -0.5
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    theirs = torch.einsum("bhts,bsgd->bthd", scores.masked_fill(unseen, -torch.inf).softmax(-1), exact[2])
    found = [ours, *torch.autograd.grad(ours, given, upstream)]
    wanted = [theirs, *torch.autograd.grad(theirs, exact, upstream[:, :, :per_group].double())]
    return [float((a[:, :, : b.shape[2]].double() - b).norm() / b.norm()) for a, b in zip(found, wanted)]


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
