#!/usr/bin/env python3
"""Find the best configurations of the linear layers' Triton kernels on this GPU, for the shapes of all named layouts.

    python tools/tune_kernels.py                  # writes megatron_hylo/kernels/tuned/sm90.json on an H100
    python tools/tune_kernels.py --only '["(6, 256, 512)"]'

Needed once for a new kind of GPU, or new versions of Triton, fla or mamba-ssm, with nothing else on the GPU. Two or three
minutes a shape of Gated DeltaNet; where there are several GPUs, one process on each can take some of the shapes.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {
    "HYLO_AUTOTUNE": "always",
    "FLA_CACHE_RESULTS": "0",
    "TRITON_CACHE_AUTOTUNING": "0",
}  # times are to be taken anew

import torch
from filelock import FileLock
from jsonargparse import auto_cli

from megatron_hylo.config.layouts import LAYOUTS
from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.kernels.kda import kda
from megatron_hylo.kernels.recurrence_part import DeltaRulePart
from megatron_hylo.kernels.registry import override
from megatron_hylo.kernels.ssd import ssd
from megatron_hylo.kernels.tuned import FOLDER, found

SHORT = (16, 2048)  # sequences, tokens: fill the GPU; compiled kernels are the same for any other length that 128 divides
# one chunk waits for another, and a long sequence alone has too few heads to fill the GPU: many small blocks are best then
LONG = (1, 32_768)
WIDE = 128 * 128  # numbers of a state from which models are large, and trained with long sequences


def main(only: list[str] = [], output: Path | None = None) -> None:  # noqa: B006  jsonargparse shows it
    """Tune the kernels and add their configurations to the file, case by case.

    Args:
        only: parts of names of cases, such as "(6, 256, 512)" or ssd; all cases by default.
        output: file to add to; by default the package's, for this GPU's compute capability.
    """
    if not torch.cuda.is_available():
        sys.exit("tune_kernels.py needs a CUDA GPU: Triton's kernels run nowhere else")
    torch.manual_seed(0)
    work = [(name, run) for name, run in cases() if not only or any(part in name for part in only)]
    if not work:
        sys.exit(f"no case has any of {only} in its name; there are: {', '.join(name for name, _ in cases())}")
    major, minor = torch.cuda.get_device_capability()
    file = output or FOLDER / f"sm{major}{minor}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    for number, (name, run) in enumerate(work, 1):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        shapes = add(file, found())
        print(f"{number}/{len(work)} {name}: {time.perf_counter() - start:.1f} s; {file} has {shapes} shapes", flush=True)


def add(file: Path, kernels: dict[str, list[dict]]) -> int:
    """Put configurations into a file, over those of the same shapes there; other processes may do so at the same time.

    Returns:
        Shapes that the file now has, over all kernels. What other versions of the libraries found is dropped.
    """
    versions = {name: __import__(name).__version__ for name in ("torch", "triton", "fla")}
    with FileLock(file.with_suffix(".lock")):
        before = json.loads(file.read_text()) if file.is_file() else {}
        merged: dict[str, dict[str, dict]] = {}
        for source in (before["kernels"] if before.get("versions") == versions else {}, kernels):
            for name, entries in source.items():
                merged.setdefault(name, {}).update({json.dumps(entry["key"]): entry for entry in entries})
        content = {name: [entries[key] for key in sorted(entries)] for name, entries in sorted(merged.items())}
        new = file.with_suffix(".new")
        new.write_text(compact({"device": torch.cuda.get_device_name(), "versions": versions, "kernels": content}))
        new.replace(file)
    return sum(map(len, content.values()))


def compact(content: dict) -> str:
    """JSON with one line a shape."""
    lines = [f'"{name}": {json.dumps(value)},' for name, value in content.items() if name != "kernels"]
    kernels = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"
        for name, entries in content["kernels"].items()
    ]
    return "{\n" + "\n".join(lines) + '\n"kernels": {\n' + ",\n".join(kernels) + "\n}\n}\n"


def cases() -> list[tuple[str, Callable[[], None]]]:
    """Every call that layers make in training and generation, by shape."""
    configs = [layout.config for layout in LAYOUTS.values()]
    deltas = {(c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim) for c in configs if "G" in c.mixers}
    scans = {(c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_dim) for c in configs if "M" in c.mixers}
    channels = {h * width for h, dk, dv in deltas for width in (dk, dv)}
    channels |= {
        c.num_query_groups * (c.mamba_head_dim + c.mamba_state_dim) + c.mamba_num_heads * c.mamba_state_dim
        for c in configs
        if "M" in c.mixers
    }
    found = []
    for shape, call in itertools.product(sorted(deltas, reverse=True), (delta, part, prefill, delta_by_fla, channel_delta)):
        found.append((f"{call.__name__} {shape}", lambda shape=shape, call=call: call(*delta_inputs(*shape))))
    for shape, reset_mask, state in itertools.product(sorted(scans), (False, True), (False, True)):
        name = f"ssd {shape} packed={reset_mask} state={state}"
        found.append((name, lambda shape=shape, reset_mask=reset_mask, state=state: scan(*shape, reset_mask, state)))
    for width, packed in itertools.product(sorted(channels), (False, True)):
        found.append((f"causal_conv1d {width} packed={packed}", lambda width=width, packed=packed: convolve(width, packed)))
    return found


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)


def delta_inputs(heads: int, dk: int, dv: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta and an initial state."""
    batch, length = LONG if dk * dv >= WIDE else SHORT
    q, k, v = (random(batch, length, heads, n) for n in (dk, dk, dv))
    g = -torch.rand(batch, length, heads, device="cuda")
    beta = torch.rand(batch, length, heads, device="cuda").bfloat16()
    return q, k, v, g.requires_grad_(), beta.requires_grad_(), random(batch, heads, dk, dv, dtype=torch.float32)


def delta(*inputs: torch.Tensor) -> None:
    """Gated DeltaNet: forward and backward."""
    gated_delta_rule(*inputs[:5])[0].sum().backward()


def delta_by_fla(*inputs: torch.Tensor) -> None:
    """The same with fla's own chain, where ours would run."""
    with override("delta_rule_state_pass", "fla"):
        delta(*inputs)


@torch.no_grad()
def part(*inputs: torch.Tensor) -> None:
    """Forward and backward of a part of a sequence: what a rank of context parallelism calls."""
    *values, state = inputs
    ours, effect = DeltaRulePart.begin(*values)
    ours.gradients(state, effect.outputs(state), state)


@torch.no_grad()
def prefill(*inputs: torch.Tensor) -> None:
    """A prompt, from nothing and going on."""
    gated_delta_rule(*inputs[:5], output_final_state=True)
    gated_delta_rule(*inputs, output_final_state=True)


def channel_delta(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *others: torch.Tensor) -> None:
    """KDA, in a layer's place of Gated DeltaNet: forward and backward, then a prompt, from nothing and going on."""
    beta, state = others
    by_channel = g.detach()[..., None].repeat(1, 1, 1, q.shape[-1]).requires_grad_()
    kda(q, k, v, by_channel, beta)[0].sum().backward()
    with torch.no_grad():
        for before in (None, state):
            kda(q, k, v, by_channel, beta, before, output_final_state=True)


def scan(heads: int, width: int, width_of_state: int, packed: bool, state: bool) -> None:
    """Forward and backward; with a state also a prefill."""
    batch, length = SHORT
    x, b, c = (random(batch, length, heads, n) for n in (width, width_of_state, width_of_state))
    dt = torch.rand(batch, length, heads, device="cuda", requires_grad=True)
    rate, skip = -torch.rand(heads, device="cuda"), torch.rand(heads, device="cuda")
    for parameter in (rate, skip):
        parameter.requires_grad_()
    before = random(batch, heads, width, width_of_state, dtype=torch.float32) if state else None
    reset_mask = torch.arange(length, device="cuda") % 300 == 0 if packed else None
    ssd(x, dt, rate, b, c, skip, before, reset_mask=reset_mask)[0].sum().backward()
    if state:
        with torch.no_grad():
            ssd(x, dt, rate, b, c, skip, before, output_final_state=True)


def convolve(channels: int, packed: bool) -> None:
    """Forward and backward, with SiLU."""
    batch, length = (1 if packed else SHORT[0]), SHORT[1]
    positions = torch.arange(length, device="cuda") % 300 if packed else None
    for bias in (None, random(channels)):
        x, weight = random(batch, length, channels), random(channels, 4)
        causal_conv1d(x, weight, bias, activation="silu", positions=positions)[0].sum().backward()


if __name__ == "__main__":
    auto_cli(main)
