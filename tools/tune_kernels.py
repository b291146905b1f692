#!/usr/bin/env python3
"""Find the best configurations of the linear layers' Triton kernels on this GPU, for the shapes of all named layouts.

    python tools/tune_kernels.py                  # writes megatron_hylo/kernels/tuned/sm90.json on an H100
    python tools/tune_kernels.py --workers 16     # that many processes compile first

Needed once for a new kind of GPU, or new versions of Triton, fla or mamba-ssm. First all configurations are compiled by
many processes at a time; then one process on each GPU, with nothing else there, times its share of them.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {
    "HYLO_AUTOTUNE": "always",
    "FLA_CACHE_RESULTS": "0",
    "TRITON_CACHE_AUTOTUNING": "0",
}  # times are to be taken anew

import torch
from jsonargparse import auto_cli
from rich.console import Console

from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.kernels.gated_delta_rule import delta_rule_transition, gated_delta_rule
from megatron_hylo.kernels.ssd import ssd
from megatron_hylo.kernels.tuned import FOLDER, found, modest
from megatron_hylo.layouts import LAYOUTS

BATCH = 16  # some kernels' configurations depend on the number of sequences
SLICES = 8  # of the configurations of a case, each compiled by a process of its own
LENGTH = 2048  # fills the GPU; compiled kernels are the same for any other that 128 divides


def main(workers: int = os.cpu_count() or 1, output: Path | None = None, task: str = "") -> None:
    """Tune all kernels and write their configurations.

    Args:
        workers: processes that compile before the timing; 0 to time at once.
        output: file to write; by default the package's, for this GPU's compute capability.
        task: what a process that this one starts has to do: "compile CASE SLICE" or "time SHARE GPUS FILE".
    """
    if not torch.cuda.is_available():
        sys.exit("tune_kernels.py needs a CUDA GPU: Triton's kernels run nowhere else")
    torch.manual_seed(0)
    match task.split():
        case ["compile", case, part]:
            return compile_part(int(case), int(part))
        case ["time", share, gpus, file]:
            return time_share(int(share), int(gpus), Path(file))
    console, start, gpus, count = Console(), time.perf_counter(), torch.cuda.device_count(), len(cases(LENGTH))
    if workers:
        parts = [f"compile {case} {part}" for case in range(count) for part in range(SLICES)]
        run_all(parts, workers, gpus)
        console.print(f"{count} cases compiled by {workers} processes in {time.perf_counter() - start:.0f} s")
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{share}.json" for share in range(gpus)]
        run_all([f"time {share} {gpus} {file}" for share, file in enumerate(files)], gpus, gpus)
        kernels = merge([json.loads(file.read_text()) for file in files])
    major, minor = torch.cuda.get_device_capability()
    file = output or FOLDER / f"sm{major}{minor}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: __import__(name).__version__ for name in ("torch", "triton", "fla")}
    file.write_text(compact({"device": torch.cuda.get_device_name(), **versions, "kernels": kernels}))
    shapes = sum(map(len, kernels.values()))
    console.print(f"{file}: {len(kernels)} kernels, {shapes} shapes, {time.perf_counter() - start:.0f} s")


def compile_part(case: int, part: int) -> None:
    """Compile one slice of every kernel's configurations, into Triton's cache; nothing is timed."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def some(self: Autotuner, kwargs: dict) -> list:
        configs = prune(self, kwargs)
        return [*configs[part::SLICES], modest(configs)]  # the modest one runs where the others ask for too much

    def once(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        call()
        return [0.0 for _ in quantiles]

    Autotuner.prune_configs, Autotuner.do_bench = some, staticmethod(once)
    cases(length=256)[case][1]()
    torch.cuda.synchronize()


def time_share(share: int, gpus: int, file: Path) -> None:
    """Tune every `gpus`-th case and write what was found."""
    for name, run in cases(LENGTH)[share::gpus]:
        before = time.perf_counter()
        run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"  {name}: {time.perf_counter() - before:.1f} s", flush=True)
    file.write_text(json.dumps(found()))


def run_all(tasks: list[str], workers: int, gpus: int) -> None:
    """Run tasks in processes of their own, so many at a time, over the GPUs by turns; ends this one if one fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    devices, waiting, running = visible.split(","), list(enumerate(tasks)), []
    while waiting or running:
        while waiting and len(running) < workers:
            number, task = waiting.pop(0)
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices[number % gpus]}
            running.append(subprocess.Popen([sys.executable, __file__, "--task", task], env=environment))
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            if process.returncode:
                for other in running:
                    other.kill()
                sys.exit(f"{' '.join(map(str, process.args))} failed")
        time.sleep(0.2)


def merge(shares: list[dict[str, list[dict]]]) -> dict[str, list[dict]]:
    """One table of what several processes found; a shape that two of them saw is kept once."""
    kernels: dict[str, dict[str, dict]] = {}
    for share in shares:
        for name, entries in share.items():
            for entry in entries:
                kernels.setdefault(name, {}).setdefault(str(entry["key"]), entry)
    return {name: [entries[key] for key in sorted(entries)] for name, entries in sorted(kernels.items())}


def compact(content: dict) -> str:
    """JSON with one line a shape."""
    lines = [f'"{name}": {json.dumps(value)},' for name, value in content.items() if name != "kernels"]
    kernels = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"
        for name, entries in content["kernels"].items()
    ]
    return "{\n" + "\n".join(lines) + '\n"kernels": {\n' + ",\n".join(kernels) + "\n}\n}\n"


def cases(length: int) -> list[tuple[str, Callable[[], None]]]:
    """Every call that layers make in training and generation, by shape, on sequences of `length` tokens."""
    configs = [layout.config for layout in LAYOUTS.values()]
    deltas = {(c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim) for c in configs if "G" in c.mixers}
    scans = {(c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_dim) for c in configs if "M" in c.mixers}
    channels = {h * (2 * dk + dv) for h, dk, dv in deltas}
    channels |= {
        c.num_query_groups * (c.mamba_head_dim + c.mamba_state_dim) + c.mamba_num_heads * c.mamba_state_dim
        for c in configs
        if "M" in c.mixers
    }
    found = []
    for shape, call in itertools.product(sorted(deltas, reverse=True), (delta, delta_with_state, transition, prefill)):
        found.append((f"{call.__name__} {shape}", lambda shape=shape, call=call: call(*delta_inputs(*shape, length))))
    for shape, begins, state in itertools.product(sorted(scans), (False, True), (False, True)):
        name = f"ssd {shape} packed={begins} state={state}"
        found.append((name, lambda shape=shape, begins=begins, state=state: scan(*shape, length, begins, state)))
    for width, packed in itertools.product(sorted(channels), (False, True)):
        found.append(
            (f"causal_conv1d {width} packed={packed}", lambda width=width, packed=packed: convolve(width, length, packed))
        )
    return found


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)


def delta_inputs(heads: int, dk: int, dv: int, length: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, beta and an initial state."""
    q, k, v = (random(BATCH, length, heads, n) for n in (dk, dk, dv))
    g = -torch.rand(BATCH, length, heads, device="cuda")
    beta = torch.rand(BATCH, length, heads, device="cuda").bfloat16()
    return q, k, v, g.requires_grad_(), beta.requires_grad_(), random(BATCH, heads, dk, dv, dtype=torch.float32)


def delta(*inputs: torch.Tensor) -> None:
    """Gated DeltaNet: forward and backward."""
    gated_delta_rule(*inputs[:5])[0].sum().backward()


def delta_with_state(*inputs: torch.Tensor) -> None:
    """The same from a state: what a rank of context parallelism calls."""
    gated_delta_rule(*inputs)[0].sum().backward()


def transition(_, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor) -> None:
    """What a part of a sequence does to the state: what the ranks of context parallelism exchange."""
    a, b = delta_rule_transition(k, v, g, beta)
    (a.sum() + b.sum()).backward()


@torch.no_grad()
def prefill(*inputs: torch.Tensor) -> None:
    """A prompt, from nothing and going on."""
    gated_delta_rule(*inputs[:5], output_final_state=True)
    gated_delta_rule(*inputs, output_final_state=True)


def scan(heads: int, width: int, width_of_state: int, length: int, packed: bool, state: bool) -> None:
    """Forward and backward; with a state also a prefill."""
    x, b, c = (random(BATCH, length, heads, n) for n in (width, width_of_state, width_of_state))
    dt = torch.rand(BATCH, length, heads, device="cuda", requires_grad=True)
    rate, skip = -torch.rand(heads, device="cuda"), torch.rand(heads, device="cuda")
    for parameter in (rate, skip):
        parameter.requires_grad_()
    before = random(BATCH, heads, width, width_of_state, dtype=torch.float32) if state else None
    begins = torch.arange(length, device="cuda") % 300 == 0 if packed else None
    ssd(x, dt, rate, b, c, skip, before, begins=begins)[0].sum().backward()
    if state:
        with torch.no_grad():
            ssd(x, dt, rate, b, c, skip, before, output_final_state=True)


def convolve(channels: int, length: int, packed: bool) -> None:
    """Forward and backward, with SiLU."""
    positions = torch.arange(length, device="cuda") % 300 if packed else None
    for bias in (None, random(channels)):
        batch = 1 if packed else BATCH
        x, weight = random(batch, length, channels), random(channels, 4)
        causal_conv1d(x, weight, bias, activation="silu", positions=positions)[0].sum().backward()


if __name__ == "__main__":
    auto_cli(main)
