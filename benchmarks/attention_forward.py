"""Attention without a gradient, as frozen teachers, evaluation and prefill compute it: FlashAttention-3 and -4 against cuDNN.

    python benchmarks/attention_forward.py                              # 64K and 16K tokens, half a minute on an H200
    python benchmarks/attention_forward.py --tokens 256 --repeats 1     # small, on a CPU, where all is plain torch

Causal, bf16, through `megatron_hylo.kernels.attention`, medians over repeats, the kernels in turn. Keys have a mean of their
own in each channel, as trained models' have. Errors are relative, by norm, against fp32 on the same numbers, over 64 queries of
all heads. FP8 includes its quantisation. Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from report import device_name, report, seconds
from torch import Tensor

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.registry import override

SHAPES = (  # query heads, KV heads, width of queries and keys, width of values, documents; whose
    (32, 8, 128, 128, 1, "8B teacher"), (32, 8, 128, 128, 8, "8B teacher"), (32, 8, 64, 64, 1, "1B teacher"),
    (32, 8, 96, 64, 1, "MLA"), (32, 8, 192, 128, 1, "wide MLA"),
)  # fmt: skip
KERNELS = {
    "cudnn": ("attention", "cudnn"), "fa4": ("attention", "fa4"),
    "fa3": ("attention_forward", "fa3"), "fa3_fp8": ("attention_forward", "fa3_fp8"),
}  # fmt: skip
COLUMNS = ("heads", "channels", "tokens", "documents", "kernel", "ms", "TFLOP/s", "x cuDNN", "error")


def main(
    tokens: tuple[int, ...] = (65_536, 16_384),
    repeats: int = 10,
    spread: float = 2.0,
    results: Path = Path("benchmarks/results/attention_forward"),
    commit: str = "",
) -> None:
    """Measure all shapes.

    Args:
        tokens: lengths.
        repeats: timed passes of each kernel, after two that are not.
        spread: standard deviation of the scores.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = KERNELS if device.type == "cuda" else {"torch": ("attention_forward", "torch")}
    generator = torch.Generator(device).manual_seed(0)
    rows = []
    for length in tokens:
        for heads, groups, width, values, count, whose in SHAPES:
            q, k, v = inputs(length, heads, groups, width, values, spread, generator)
            step = length // count
            documents = [(slice(i * step, (i + 1) * step),) * 2 for i in range(count)] if count > 1 else None
            found = measure(kernels, lambda: attention(q, k, v, width**-0.5, documents=documents), repeats)  # noqa: B023
            first = length - step  # of the last document
            queries = torch.linspace(0, step - 1, 64, device=device).long()
            wanted = exact(q[:, first:][:, queries], k[:, first:], v[:, first:], queries, width**-0.5)
            flops = heads * (width + values) * step**2 * count  # half of all pairs, two operations each
            about = dict(whose=whose, heads=f"{heads}/{groups}", channels=f"{width}, {values}", tokens=length, documents=count)
            for name, (time, out) in found.items():
                row = about | {"kernel": name, "ms": None, "tflops": None, "ratio": None, "error": out}
                if isinstance(out, Tensor):
                    error = float((out[:, first:][:, queries].double() - wanted).norm() / wanted.norm())
                    ratio = found["cudnn"][0] / time if "cudnn" in found else 1.0
                    row |= {"ms": 1e3 * time, "tflops": flops / time / 1e12, "ratio": ratio, "error": error}
                rows.append(row)
                print(json.dumps(row), flush=True)
    cells = [
        (f"{r['heads']} ({r['whose']})", r["channels"], f"{r['tokens']:,}", str(r["documents"]), r["kernel"],
         *(("", "", "", r["error"]) if r["ms"] is None else
           (f"{r['ms']:.2f}", f"{r['tflops']:.0f}", f"{r['ratio']:.2f}", f"{r['error']:.1e}")))
        for r in rows
    ]  # fmt: skip
    intro = ["Causal, bf16, batch 1; channels of queries and keys, of values; error relative to fp32 by norm."]
    report(results, "Attention without a gradient", intro, COLUMNS, cells, f"{device_name()}, commit {commit or 'not given'}")
    print(json.dumps({"benchmark": "attention_forward", "device": device_name(), "rows": rows}))


def inputs(
    length: int, heads: int, groups: int, width: int, values: int, spread: float, generator: torch.Generator
) -> list[Tensor]:
    """Queries [1, length, heads, width], keys with a mean in each channel, and values, bf16."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=generator.device)  # noqa: E731
    tensors = (spread * draw(1, length, heads, width), draw(1, length, groups, width), draw(1, length, groups, values))
    return [x.bfloat16() for x in (tensors[0], tensors[1] + 2 * draw(groups, width), tensors[2])]


def measure(
    kernels: dict[str, tuple[str, str]], run: Callable[[], Tensor], repeats: int
) -> dict[str, tuple[float, Tensor | str]]:
    """Median seconds and the output of each kernel; zero and the reason of one that cannot run."""
    found: dict[str, tuple[float, Tensor | str]] = {}
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, chosen in kernels.items():
            try:
                with override(*chosen):
                    run()
                    times[name], found[name] = [], (0.0, run())
            except RuntimeError as error:
                found[name] = 0.0, str(error).splitlines()[0]
        for _ in range(repeats):
            for name in times:
                with override(*kernels[name]):
                    times[name].append(seconds(run))
    return found | {name: (statistics.median(all_times), found[name][1]) for name, all_times in times.items()}


def exact(q: Tensor, k: Tensor, v: Tensor, places: Tensor, scale: float) -> Tensor:
    """Attention of queries at these places of a sequence to the keys up to them, in fp32 products and float64 sums."""
    outs = []
    for group in range(k.shape[2]):  # [n, heads of the group, width], [s, width]
        queries = q[0].unflatten(1, (k.shape[2], -1))[:, group].float()
        scores = torch.einsum("nhd,sd->nhs", queries, k[0, :, group].float()).double() * scale
        scores.masked_fill_(torch.arange(k.shape[1], device=q.device) > places[:, None, None], -torch.inf)
        outs.append(torch.einsum("nhs,sd->nhd", scores.softmax(-1), v[0, :, group].double()))
    return torch.cat(outs, 1)[None]


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
