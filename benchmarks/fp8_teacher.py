"""A teacher in FP8 against the same in bf16: time of a forward pass, memory, and what it says differently.

    python benchmarks/fp8_teacher.py                # an 8B-shaped teacher's speed; KL of the real 135M teacher on held-out text
    python benchmarks/fp8_teacher.py --real false --base smollm2-135m --lengths [2048]

Speed is that of the layers, without the output head (which is bf16 in both), random weights, one sequence, medians. KL is
KL(bf16 teacher || FP8 teacher) in nats a token; for comparison, bf16's own to fp32. That teacher is SmolLM2-135M-Instruct
dequantised from 4 bits, the text the Debian documentation packages, whole documents held out. Needs a GPU with FP8 and
Transformer Engine. Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from report import device_name, free_memory, report, seconds

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import Fp8
from megatron_hylo.config.layouts import BASES
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.data.artefacts import fetch_documents, fetch_teacher
from megatron_hylo.data.heldout import heldout_windows
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.eval.perplexity import evaluate
from megatron_hylo.io import has_manifest
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.fp8 import check_fp8
from megatron_hylo.models.frozen import freeze
from megatron_hylo.models.hylo_model import HyloModel, build_model
from megatron_hylo.plan.flops import forward_flops_per_token
from megatron_hylo.platform.distributed import session

COLUMNS = ("teacher", "weights, GiB", "tokens", "bf16, ms", "FP8, ms", "bf16 / FP8", "FP8, TFLOP/s")
PRECISIONS = ("bf16", "fp8")


def main(
    base: str = "llama3.1-8b",
    lengths: list[int] = [8192, 65_536],  # noqa: B006  jsonargparse shows it
    repeats: int = 5,
    real: bool = True,
    work: Path = Path("runs/fp8_teacher"),
    windows: int = 32,
    results: Path = Path("benchmarks/results/fp8_teacher"),
    commit: str = "",
) -> None:
    """Measure.

    Args:
        base: base model whose shape is timed.
        lengths: tokens of a sequence.
        repeats: timed passes, after two that are not.
        real: measure KL with the real teacher too.
        work: folder for that teacher and its data.
        windows: held-out windows of 2,048 tokens.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    with session() as device, torch.no_grad():
        check_fp8("te")
        speed = {precision: _speed(base, precision, lengths, repeats, device) for precision in PRECISIONS}
        quality = _quality(work, windows) if real else {}
    _show(base, lengths, speed, quality, results, commit)


def _speed(base: str, precision: str, lengths: list[int], repeats: int, device: torch.device) -> dict[str, Any]:
    """{"gib": of weights, "ms": [median of each length]}."""
    free_memory()
    before = torch.cuda.memory_allocated()
    fp8 = "e4m3" if precision == "fp8" else None
    (model,) = freeze([build_model(BASES[base], params_dtype=torch.bfloat16, backend="te", fp8=fp8)])
    gib = (torch.cuda.memory_allocated() - before) / 2**30
    ids = [torch.randint(BASES[base].vocab_size, (1, length), device=device) for length in lengths]
    times = [[seconds(partial(model, i)) for _ in range(2 + repeats)][2:] for i in ids]
    return {"gib": gib, "ms": [1e3 * statistics.median(t) for t in times]}


def _quality(work: Path, windows: int) -> dict[str, dict[str, Any]]:
    """Held-out quality of the FP8 and the bf16 teacher, each compared with the next more precise one."""
    free_memory()
    if not has_manifest(work / "teacher"):
        convert_hf_to_megatron(fetch_teacher(), work / "teacher")
    if not has_manifest(work / "data"):
        preprocess(str(fetch_documents()), str(work / "data"), str(work / "teacher"))
    ids = heldout_windows(work / "data" / "heldout", 2048, windows)

    def load(dtype: torch.dtype = torch.bfloat16, fp8: Fp8 | None = None) -> HyloModel:
        (model,) = freeze([load_model(work / "teacher", params_dtype=dtype, backend="te", fp8=fp8)])
        return model

    bf16 = load()
    pairs = {"FP8 against bf16": (load(fp8="e4m3"), bf16), "bf16 against fp32": (bf16, load(torch.float32))}
    return {name: evaluate(model, ids, teacher).to_dict() for name, (model, teacher) in pairs.items()}


def _show(base: str, lengths: list[int], speed: dict[str, Any], quality: dict[str, Any], results: Path, commit: str) -> None:
    rows = []
    for index, length in enumerate(lengths):
        bf16, fp8 = (speed[precision]["ms"][index] for precision in PRECISIONS)
        rate = forward_flops_per_token(BASES[base], length, with_head=False) * length / fp8 / 1e9
        rows.append(dict(tokens=length, bf16_ms=bf16, fp8_ms=fp8, ratio=bf16 / fp8, fp8_tflops=rate))
    weights = " / ".join(f"{speed[precision]['gib']:.1f}" for precision in PRECISIONS)
    cells = [
        (base, weights, f"{r['tokens']:,}", f"{r['bf16_ms']:.1f}", f"{r['fp8_ms']:.1f}", f"{r['ratio']:.2f}",
         f"{r['fp8_tflops']:.0f}")
        for r in rows
    ]  # fmt: skip
    intro = ["Forward passes without the output head, random weights, one sequence; weights in bf16 / with FP8."]
    intro += [
        f"SmolLM2-135M-Instruct dequantised from 4 bits, {found['tokens']:,} held-out tokens, {name}: KL {found['kl']:.2e} "
        f"nats a token, top-1 agreement {100 * found['agreement']:.1f} %, perplexity {found['perplexity']:.3f}."
        for name, found in quality.items()
    ]
    report(results, "A teacher in FP8", intro, COLUMNS, cells, f"{device_name()}, commit {commit}, {in_use()}")
    print("\n".join(intro[1:]))
    gib = {precision: speed[precision]["gib"] for precision in PRECISIONS}
    print(json.dumps({"benchmark": "fp8_teacher", "device": device_name(), "base": base, "weights_gib": gib, "rows": rows,
                      "quality": quality}))  # fmt: skip


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
