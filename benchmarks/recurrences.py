"""Forward and backward of the linear layers' recurrences at the sizes of the 1B hybrids, against fla's and mamba_ssm's own.

    python benchmarks/recurrences.py                                  # 65,536 tokens, a few seconds on an H100
    python benchmarks/recurrences.py --tokens 2048 --sequences 32     # short ones, where the chain of chunks is short

Medians over repeats, the peer in turn with ours. Two floors: the bytes of inputs, outputs and their gradients once at
BANDWIDTH, and the products of the chunked form at PRODUCT_RATE. "states kept" is what recomputed layers run: the chunks' states
stay between the recomputed forward pass and the backward pass. Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from report import device_name, report, seconds
from torch import Tensor

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.kernels.delta_rule_states import CHUNK
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.kernels.kda import kda
from megatron_hylo.kernels.registry import in_use, override
from megatron_hylo.kernels.ssd import MAMBA_CHUNK, MAMBA_MODULE, ssd

BANDWIDTH, PRODUCT_RATE = 4.3e12, 790e12  # bytes/s of a copy and FLOP/s of an 8192-cubed product, measured on an H200
COLUMNS = ("recurrence", "ms", "x the peer", "peer ms", "bytes' floor ms", "products' floor ms", "largest error")
Run = Callable[[], tuple[Tensor, ...]]  # the output and all gradients


def main(
    tokens: int = 65_536,
    sequences: int = 1,
    gated_delta_net: tuple[int, int, int] = (6, 256, 512),
    mamba2: tuple[int, int, int] = (32, 64, 64),
    repeats: int = 20,
    results: Path = Path("benchmarks/results/recurrences"),
    commit: str = "",
) -> None:
    """Measure the recurrences.

    Args:
        tokens, sequences: sizes of the batch.
        gated_delta_net: heads, width of keys, width of values; of KDA too.
        mamba2: heads, their width, size of the state.
        repeats: timed passes, after three that are not.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    if not torch.cuda.is_available():
        raise SystemExit("recurrences.py times CUDA kernels: it needs a GPU")
    torch.manual_seed(0)
    cases = delta_rules(sequences, tokens, *gated_delta_net) | {"KDA": kda_rule(sequences, tokens, *gated_delta_net)}
    cases["Mamba2"] = scan(sequences, tokens, *mamba2)
    for ours, *_ in cases.values():
        ours()
    kernels, rows = in_use(), []  # the peers' would be named later
    for name, (ours, peer, moved, products) in cases.items():
        error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(ours(), peer(), strict=True))
        mine, theirs = times(ours, peer, repeats)
        rows.append(dict(recurrence=name, ms=mine, peer_ms=theirs, ratio=theirs / mine, bytes_ms=1e3 * moved / BANDWIDTH,
                         products_ms=1e3 * products / PRODUCT_RATE, error=error))  # fmt: skip
    sizes = f"{sequences} x {tokens:,} tokens"
    report(
        results, "Recurrences of linear layers", [
            f"Forward and backward, bf16, {sizes}: Gated DeltaNet and KDA {' x '.join(map(str, gated_delta_net))} (heads, "
            f"keys, values), Mamba2 {' x '.join(map(str, mamba2))} (heads, width, state). Peers: fla's, mamba_ssm's own.",
        ], COLUMNS,
        [(r["recurrence"], f"{r['ms']:.2f}", f"{r['ratio']:.2f}", f"{r['peer_ms']:.2f}", f"{r['bytes_ms']:.2f}",
          f"{r['products_ms']:.2f}", f"{r['error']:.1e}") for r in rows],
        f"Triton {importlib.import_module('triton').__version__}, {device_name()}, commit {commit or 'not given'}, {kernels}",
    )  # fmt: skip
    print(json.dumps({"benchmark": "recurrences", "device": device_name(), "tokens": tokens, "rows": rows}))


def fla_rule(module: str, name: str, inputs: list[Tensor], upstream: Tensor) -> Run:
    """Return fla's own function, forward and backward, as its layers call it."""
    fla = getattr(importlib.import_module(module), name)

    def peer() -> tuple[Tensor, ...]:
        with override("delta_rule_state_pass", "fla"):
            out, _ = fla(*inputs, use_qk_l2norm_in_kernel=True)
            return out, *torch.autograd.grad(out, inputs, upstream)

    return peer


def delta_rules(b: int, t: int, h: int, dk: int, dv: int) -> dict[str, tuple[Run, Run, float, float]]:
    """Ours as layers call it, with states kept and without; fla's own; bytes; FLOPs."""
    q, k, v, upstream = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for d in (dk, dk, dv, dv))
    g, beta = -torch.rand(b, t, h, device="cuda") / 10, torch.rand(b, t, h, device="cuda", dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    peer = fla_rule("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", inputs, upstream)

    def ours(keep_states: bool) -> tuple[Tensor, ...]:
        out, _ = gated_delta_rule(*inputs, keep_states=keep_states)
        return out, *torch.autograd.grad(out, inputs, upstream)

    moved = 2 * b * t * h * (6 * dk + 5 * dv)  # q, k, v, o; do again with q, k, v; dq, dk, dv
    # a chunk forward: keys with keys, what the system gives, reads of the state, its update, outputs; twice that backward
    forward = 2 * CHUNK * (CHUNK * (3 * dk + 2 * dv) + 3 * dk * dv)
    products = 3 * b * h * -(-t // CHUNK) * forward
    return {
        "Gated DeltaNet": (lambda: ours(False), peer, moved, products),
        "Gated DeltaNet, states kept": (lambda: ours(True), peer, moved, products),
    }


def kda_rule(b: int, t: int, h: int, dk: int, dv: int) -> tuple[Run, Run, float, float]:
    """Ours, which calls fla's kernels; fla's function as its own layer calls it; bytes; FLOPs."""
    q, k, v, upstream = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for d in (dk, dk, dv, dv))
    g, beta = -torch.rand(b, t, h, dk, device="cuda") / 10, torch.rand(b, t, h, device="cuda", dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    peer = fla_rule("fla.ops.kda", "chunk_kda", inputs, upstream)

    def ours() -> tuple[Tensor, ...]:
        out, _ = kda(*inputs)
        return out, *torch.autograd.grad(out, inputs, upstream)

    moved = b * t * h * (2 * (6 * dk + 5 * dv) + 4 * 3 * dk)  # as Gated DeltaNet, and fp32 decays: read twice, their gradient
    forward = 2 * CHUNK * (CHUNK * (3 * dk + 2 * dv) + 3 * dk * dv)
    return ours, peer, moved, 3 * b * h * -(-t // CHUNK) * forward


def scan(b: int, t: int, h: int, p: int, n: int) -> tuple[Run, Run, float, float]:
    """Ours, mamba_ssm's own, bytes, FLOPs."""
    x, B, C, upstream = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for d in (p, n, n, p))
    dt = F.softplus(torch.randn(b, t, h, device="cuda") - 3)
    A, D = -torch.rand(h, device="cuda") - 0.5, torch.ones(h, device="cuda")
    inputs = [y.requires_grad_() for y in (x, dt, A, B, C, D)]
    mamba_ssm = importlib.import_module(MAMBA_MODULE).mamba_chunk_scan_combined

    def peer() -> tuple[Tensor, ...]:
        out = mamba_ssm(*inputs[:5], MAMBA_CHUNK, D=D)
        return out, *torch.autograd.grad(out, inputs, upstream)

    def ours() -> tuple[Tensor, ...]:
        out, _ = ssd(*inputs)
        return out, *torch.autograd.grad(out, inputs, upstream)

    moved = 2 * b * t * h * (6 * n + 5 * p)
    forward = 2 * MAMBA_CHUNK * (MAMBA_CHUNK * (n + p) + 2 * n * p)
    return ours, peer, moved, 3 * b * h * -(-t // MAMBA_CHUNK) * forward


def times(ours: Run, peer: Run, repeats: int) -> tuple[float, float]:
    """Milliseconds of each, medians; in turn, so that both have the same machine."""
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 3):
        for run, values in zip((ours, peer), found, strict=True):
            took = 1e3 * seconds(run)
            if i >= 3:
                values.append(took)
    return statistics.median(found[0]), statistics.median(found[1])


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
