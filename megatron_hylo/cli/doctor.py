"""`hylo doctor`: what this machine has, which kernel runs each operation, and whether it is right."""

import platform
import shutil
from dataclasses import asdict
from typing import Literal

from rich.table import Table

from megatron_hylo.cli.console import console, print_json, results
from megatron_hylo.cli.upcycle import chosen_dtype

PACKAGES = (  # distribution, what it is for; None: needed
    ("torch", None), ("megatron-core", None), ("transformers", None), ("safetensors", None),
    ("transformer-engine", "backend te: linear maps, SwiGLU, Adam, FP8"), ("triton", "all fast kernels of linear layers"),
    ("flash-linear-attention", "Gated DeltaNet, convolutions"), ("mamba-ssm", "Mamba2"),
    ("fa3-fwd", "attention of frozen models, evaluation and prefill on Hopper"),
    ("flash-attn-4", "HYLO_KERNELS=attention=fa4: attention that trains, on Hopper"),
    ("apex", "Megatron-Core's fused optimizer, where Transformer Engine is not there"), ("wandb", "logging there"),
)  # fmt: skip


def doctor(
    layout: str = "all", precision: Literal["bf16", "fp32"] | None = None, json: bool = False, node: bool = False
) -> int:
    """Show the environment, then compare every kernel's output and gradients with its definition at a layout's shapes.

    With --node, under torchrun on all nodes of a job: half a minute that names the slow or broken rank before a long run.
    Exits 1 where a kernel is wrong. Training makes the same comparison before its first run with new shapes or libraries.

    Args:
        layout: a named layout (see `hylo layouts`); all: one of each linear layer at the sizes of the quickstart, and on a
            GPU the 1B hybrid's.
        precision: bf16 on a GPU and fp32 on a CPU by default.
        json: print the comparisons of kernels alone, or with --node all ranks, as JSON.
        node: compare ranks instead of kernels: GPUs, clock, a matrix product, all-reduce inside each node and over all.
    """
    if node:
        return _compare_ranks(json)
    from megatron_hylo.config.layouts import get_layout

    if layout != "all":
        get_layout(layout)  # before PyTorch is imported
    from megatron_hylo.models.decode_check import check_decode_kernels
    from megatron_hylo.models.kernel_check import Check, check_kernels
    from megatron_hylo.platform.distributed import device

    where = device()
    if not json:
        _environment(where)
        _third_party_changes()
    names = [layout]
    if layout == "all":  # some kernels are for the larger's widths alone; in plain torch it would take minutes
        large = ["llama3.2-1b-4mla12gdn"] if where.type == "cuda" else []
        names = ["smollm2-135m-8mla22gdn-teacher", "smollm2-135m-8mla22m2-teacher", *large]
    dtype = chosen_dtype(precision)
    checks: dict[tuple[str, str], Check] = {}
    with console.status("comparing kernels with their definitions"):
        for name in names:
            for check in (check_kernels, check_decode_kernels):
                checks |= {(c.operation, c.shape): c for c in check(get_layout(name).config, dtype, where, checks)}
    wrong = [c.operation for c in checks.values() if not c.ok]
    if json:
        print_json([asdict(c) | {"ok": c.ok} for c in checks.values()])
        return 1 if wrong else 0
    table = Table(title=f"kernels against their definitions, {str(dtype).removeprefix('torch.')}, relative error")
    for column in ("operation", "shape", "runs by", "largest error", "of", "limit", ""):
        table.add_column(column)
    for c in checks.values():
        verdict = "right" if c.ok else "[bold red]WRONG[/]"
        table.add_row(c.operation, c.shape, c.implementation, f"{c.error:.1e}", c.where, f"{c.limit:.0e}", verdict)
    results.print(table)
    if wrong:
        console.print(f"wrong on this machine: {', '.join(wrong)}; install other versions, or HYLO_KERNELS={wrong[0]}=torch")
    return 1 if wrong else 0


def _compare_ranks(as_json: bool) -> int:
    """Print what each rank measured and what is wrong with some; exit code 1 where there is such a one."""
    from megatron_hylo.config import ParallelConfig
    from megatron_hylo.platform.distributed import is_main, session
    from megatron_hylo.platform.node_check import check_nodes

    with session(ParallelConfig(distributed_timeout_minutes=2.0)):
        ranks, problems = check_nodes()
        if is_main():
            _print_ranks([asdict(rank) for rank in ranks], problems, as_json)
    return 1 if problems else 0


def _print_ranks(ranks: list[dict], problems: list[str], as_json: bool) -> None:
    if as_json:
        print_json({"ranks": ranks, "problems": problems})
        return
    table = Table(title="ranks")
    for column in ("rank", "host", "device", "GPUs", "product, ms", "all-reduce in the node, ms", "over all, ms"):
        table.add_column(column, justify="left" if column in ("host", "device") else "right")
    for rank in ranks:
        times = [f"{1e3 * rank[name]:.1f}" for name in ("product", "node_reduce", "reduce")]
        table.add_row(str(rank["rank"]), rank["host"], rank["device"], str(rank["devices"]), *times)
    results.print(table)
    for problem in problems:
        results.print(problem, style="bold red", markup=False, highlight=False)
    results.print("some ranks should not be used" if problems else "all ranks agree", highlight=False)


def _third_party_changes() -> None:
    """Print every change to third-party code that this package makes, and which are in force."""
    from megatron_hylo.platform.third_party import CHANGES

    table = Table(title="changes to third-party code")
    for column in ("name", "changes", "reason", "scope", "in force"):
        table.add_column(column)
    for change in CHANGES:
        table.add_row(change.name, change.changes, change.reason, change.scope, "yes" if change.in_force() else "no")
    results.print(table)


def _environment(where) -> None:
    from importlib.metadata import PackageNotFoundError, version  # slow: it imports email

    import torch

    from megatron_hylo.io import cache_dir
    from megatron_hylo.kernels.tuned import FOLDER

    table = Table(title="environment")
    for column in ("what", "here", ""):
        table.add_column(column)
    table.add_row("Python", platform.python_version())
    if where.type == "cuda":
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            table.add_row(f"GPU {index}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB", f"sm{p.major}{p.minor}")
        major, minor = torch.cuda.get_device_capability()
        known = (FOLDER / f"sm{major}{minor}.json").is_file()
        found = "kept with the package" if known else "none for this GPU: tuned when first seen (tools/tune_kernels.py)"
        table.add_row("tuned kernels", found)
    else:
        table.add_row("GPU", "none: every operation in plain torch, Megatron-Core over gloo")
    for name, use in PACKAGES:
        try:
            here = version(name)
        except PackageNotFoundError:
            here = "[red]missing[/]" if use is None else "not installed"
        table.add_row(name, here, use or "needed")
    free = shutil.disk_usage(cache_dir()).free / 2**30
    table.add_row("cache folder", str(cache_dir()), f"{free:.0f} GiB free")
    results.print(table)
