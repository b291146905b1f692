#!/usr/bin/env python3
"""Blocks of the decode step's kernels, timed on this GPU: products of one vector, and attention to latents.

    python tools/tune_decode.py [packed]        # packed: only attention to a batch of mixed lengths, about 30 s

Shapes of the 3B hybrid. Prints, for each, TB/s of the bytes that must be read, the fastest first; last, one JSON line. What it
finds goes into the constants of kernels/matvec.py and kernels/decode_attention.py. About 90 s, most of it Triton compiling.
"""

import functools
import itertools
import json
import sys

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from megatron_hylo.kernels import decode_attention
from megatron_hylo.kernels.triton_matvec import multiply

MATRICES = {  # rows, columns, SwiGLU
    "input of Gated DeltaNet": (13842, 3072, False),
    "output of Gated DeltaNet": (3072, 4608, False),
    "gate and up": (8192, 3072, True),
    "down": (3072, 8192, False),
    "head": (128_256, 3072, False),
}
CACHES = {"1 sequence of 2M tokens": (1, 2**21), "32 sequences of 64K tokens": (32, 2**16)}
MIXED = [round(1024 * 256 ** (number / 63)) for number in range(64)]  # 1K to 256K tokens
HEADS, RANK, ROTARY = 24, 128, 64


def main() -> None:
    """Print a line a shape, then one JSON line."""
    found = {f"64 sequences of 1K to 256K tokens, {kind}": packed(kind) for kind in ("packed", "padded")}
    if sys.argv[1:] != ["packed"]:
        found |= {name: products(*shape) for name, shape in MATRICES.items()}
        found |= {f"{name}, FP8": products(*shape, fp8=True) for name, shape in MATRICES.items() if name != "head"}
        found |= {name: attention(*shape) for name, shape in CACHES.items()}
    print(json.dumps({"device": torch.cuda.get_device_name(), "terabytes_per_second": found}))


def ranked(name: str, speeds: dict[str, float]) -> dict[str, float]:
    """Print and return speeds, the fastest first."""
    speeds = {key: round(value, 2) for key, value in sorted(speeds.items(), key=lambda pair: -pair[1])}
    print(name, speeds, flush=True)
    return speeds


def products(rows: int, columns: int, swiglu: bool, fp8: bool = False) -> dict[str, float]:
    """TB/s of the product with one matrix, by rows x columns of a program's block, and by torch."""
    weight = torch.randn(rows * (1 + swiglu), columns, device="cuda", dtype=torch.bfloat16)
    scale = torch.ones(len(weight), device="cuda")
    x = torch.randn(1, 1, columns, device="cuda", dtype=torch.bfloat16)
    out, terabytes = x.new_empty(1, 1, rows), weight.nbytes / 1e12
    speeds = {"torch": terabytes / do_bench(lambda: F.linear(x, weight), warmup=5, rep=20) * 1e3}
    if fp8:
        weight, speeds = weight.to(torch.float8_e4m3fn), {}
        terabytes = weight.nbytes / 1e12
    for tile, width, warps in itertools.product((1, 2, 4, 8), (1024, 2048), (4, 8)):
        run = functools.partial(
            multiply[(-(-rows // tile),)], x, weight, x, scale, out, rows, columns,
            WIDTH=columns, ROWS=tile, COLUMNS=width, EVEN=columns % width == 0 and rows % tile == 0, SWIGLU=swiglu,
            RESIDUAL=False, SCALED=fp8, num_warps=warps,
        )  # fmt: skip
        speeds[f"{tile} x {width}, {warps} warps"] = terabytes / do_bench(run, warmup=5, rep=20) * 1e3
    return ranked(f"{rows} x {columns}{', SwiGLU' if swiglu else ''}", speeds)


def attention(batch: int, tokens: int) -> dict[str, float]:
    """TB/s of attention to latents, by keys of a block, programs, warps and stages."""
    latents = torch.randn(batch, tokens, 1, RANK + ROTARY, device="cuda", dtype=torch.bfloat16)
    query, terabytes = torch.randn(batch, HEADS, RANK + ROTARY, device="cuda", dtype=torch.bfloat16), latents.nbytes / 1e12
    speeds = {}
    for block, programs, warps, stages in itertools.product((32, 64, 128), (512, 1024), (4, 8), (2, 3, 4)):
        settings = dict(BLOCK=block, PROGRAMS=programs, WARPS=warps, STAGES=stages)
        for name, value in settings.items():
            setattr(decode_attention, name, value)
        run = functools.partial(decode_attention.split_attention, query, latents, RANK, 0.07, None, None, None)
        try:
            speeds[str(settings)] = terabytes / do_bench(run, warmup=5, rep=20) * 1e3
        except Exception as error:  # a block that does not fit in shared memory
            print(settings, str(error)[:80], flush=True)
    return ranked(f"attention, {batch} x {tokens:,}", speeds)


def packed(kind: str) -> dict[str, float]:
    """TB/s of the latents that are no padding, by keys of a block and parts of all sequences."""
    longest, speeds = max(MIXED), {}
    rows = (1, sum(MIXED)) if kind == "packed" else (len(MIXED), longest)
    latents = torch.randn(*rows, 1, RANK + ROTARY, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(len(MIXED), HEADS, RANK + ROTARY, device="cuda", dtype=torch.bfloat16)
    length = torch.tensor(MIXED, dtype=torch.int32, device="cuda")
    starts = length.cumsum(0).int() - length
    real = torch.arange(longest, device="cuda")[None] >= longest - length[:, None]
    arguments = (length, None, None, starts) if kind == "packed" else (None, real, None)
    terabytes = sum(MIXED) * (RANK + ROTARY) * 2 / 1e12
    parts_of = (512, 1024, 2048) if kind == "packed" else (1024,)  # padded sequences have no such parts
    for block, parts in itertools.product((64, 128), parts_of):
        decode_attention.BLOCK, decode_attention.PACKED_PARTS = block, parts
        run = functools.partial(decode_attention.split_attention, query, latents, RANK, 0.07, *arguments)
        try:
            speeds[f"BLOCK {block}, PACKED_PARTS {parts}"] = terabytes / do_bench(run, warmup=5, rep=20) * 1e3
        except Exception as error:  # a block that does not fit in shared memory
            print(block, parts, str(error)[:80], flush=True)
    decode_attention.BLOCK, decode_attention.PACKED_PARTS = 64, 1024
    return ranked(f"attention, mixed lengths, {kind}", speeds)


if __name__ == "__main__":
    with torch.no_grad():
        main()
