"""Time and peak memory of conversion, upcycling and export by size of the model, with `cp` of the same folder in the same run.

    python benchmarks/convert.py [--sizes 135m,1b,3b,8b] [--repeat N] [--scratch FOLDER] [--plot FILE.png] [--verify]
        [--last STEP] [--rest SECONDS]

Folders have the shapes of released Llamas (135m: SmolLM2) and random bf16 weights, made on the spot. Every step is a process of
its own; CPU seconds and peak resident memory are that process's, start-up included. Copies and conversions take turns
`--repeat` times, and their medians count. A conversion is compared with three copies: by `cp`, which leaves its bytes to the
kernel; by `cp` and an fsync of each file, as a conversion ends; and by those and the sha256 of each file on both sides, which
a conversion took too. Twice the size of a model must be free on the disk; each folder is removed when no later step reads it.

Before each of them nothing waits to be written, and the machine rests for `--rest` seconds: a virtual machine gives free memory
back to its host within seconds, and what is written first into memory that it has to ask for again takes up to five times the
time. Without the rest, a copy that follows the removal of another one finds that one's memory, and other steps do not.
`--verify` adds `hylo verify`, which computes logits.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.layouts import BASES, parameter_count
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.hf_config import hf_config_from_model
from megatron_hylo.convert.safetensors_files import header_bytes, tensor_bytes

SIZES = {"135m": "smollm2-135m", "1b": "llama3.2-1b", "3b": "llama3.2-3b", "8b": "llama3.1-8b"}
PATTERN = "+GGG"  # repeated over the layers
SHARD_BYTES = 1_600_000_000
COPIES = {
    "cp": "cp -r {source} {copy}",
    "cp, fsync": "cp -r {source} {copy} && sync {copy}/*",
    "cp, fsync, sha256": "cp -r {source} {copy} && sync {copy}/* && ls {source}/* {copy}/* | xargs -P 2 -n 1 openssl sha256",
}  # by OpenSSL, as Python's, which takes the processor's instructions for it, and in two processes
STEPS = ("convert", "verify --quick", "verify", "upcycle", "export")


def write_source(folder: Path, name: str) -> int:
    """Write a random Hugging Face folder with the shapes of a base model; returns its bytes."""
    config = BASES[name]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config_from_model(config, "bfloat16")))
    shards: list[list[str]] = [[]]
    size = total = 0
    shapes = {n: (torch.bfloat16, shape) for n, shape in tensor_names(config).items()}
    for tensor, (_, shape) in shapes.items():
        bytes_ = 2 * torch.Size(shape).numel()
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + bytes_, total + bytes_
    noise = (0.02 * torch.randn(2**22)).bfloat16()
    index = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        with open(folder / file, "wb") as out:
            out.write(header_bytes({n: shapes[n] for n in names}))
            for tensor in names:
                left = torch.Size(shapes[tensor][1]).numel()
                if len(shapes[tensor][1]) == 1:
                    out.write(tensor_bytes(torch.ones(left, dtype=torch.bfloat16)))
                    continue
                while left:
                    part = noise.roll(int(torch.randint(len(noise), ())))[:left]
                    out.write(tensor_bytes(part))
                    left -= len(part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; wall-clock seconds, CPU seconds and peak resident memory in GiB of its process, and the load average."""
    start = time.perf_counter()
    root = Path(__file__).parents[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}, stdout=log, stderr=log
        )
        _, status, used = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-3000:]}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
        "load": os.getloadavg()[0],
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of what was measured, but the largest peak."""
    return {key: (max if key == "peak_gib" else statistics.median)(run[key] for run in runs) for key in runs[0]}


def measure_size(
    name: str,
    work: Path,
    repeat: int,
    verify: bool,
    last: str,
    rest: float,
    show: Callable[[str, dict[str, dict[str, float]]], None],
) -> None:
    """Run all steps on one model.

    Args:
        name: of the base model.
        work: scratch folder.
        repeat: how often it is copied and converted.
        verify: compute logits too.
        last: step that is run last.
        rest: seconds without work before a copy or a conversion.
        show: called after each step with its name and all that was measured.
    """
    hylo = [sys.executable, "-W", "ignore", "-m", "megatron_hylo.cli"]
    source, teacher, hybrid, export = (work / part for part in ("source", "teacher", "hybrid", "export"))
    found: dict[str, dict[str, float]] = {"folder": {"gb": write_source(source, name) / 1e9}}
    layers = BASES[name].num_hidden_layers
    pattern = "".join(islice(cycle(PATTERN), layers))
    runs: dict[str, list[dict[str, float]]] = {}

    def measure_rested(step: str, command: list[str]) -> None:
        os.sync()
        time.sleep(rest)
        runs.setdefault(step, []).append(measure(command))

    for _ in range(repeat):
        shutil.rmtree(teacher, ignore_errors=True)
        for step, command in COPIES.items():
            shell = command.format(source=shlex.quote(str(source)), copy=shlex.quote(str(work / "copy")))
            measure_rested(step, ["sh", "-c", shell])
            shutil.rmtree(work / "copy")
        measure_rested("convert", [*hylo, "convert", str(source), str(teacher), "--no_verify"])
    for step, measured in runs.items():
        found[step] = medians(measured)
        show(step, found)
    steps: list[tuple[str, list[str], Path | None]] = [
        ("verify --quick", [*hylo, "verify", str(source), str(teacher), "--quick"], None if verify else source),
        ("verify", [*hylo, "verify", str(source), str(teacher)], source),
        ("upcycle", [*hylo, "upcycle", str(teacher), str(hybrid), "--pattern", pattern, "--init", "paper"], teacher),
        ("export", [*hylo, "export", str(hybrid), str(export), "--no_verify"], None),
    ]
    for step, command, done_with in steps:
        if STEPS.index(step) > STEPS.index(last) or step == "verify" and not verify:
            continue
        found[step] = measure(command)
        show(step, found)
        if done_with is not None:
            shutil.rmtree(done_with)


def plot(found: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Plot CPU seconds (on a busy machine they say more than time) and peak memory by size of the folder."""
    from report import draw_panels, line

    gb = [steps["folder"]["gb"] for steps in found.values()]

    def panel(axes: Any, key: str, label: str, steps: Sequence[str]) -> None:
        for number, step in enumerate(steps):
            there = [(size, measured[step][key]) for size, measured in zip(gb, found.values()) if step in measured]
            axes.plot(*zip(*there), label=step, **line(number)) if there else None
        axes.set(xscale="log", yscale="log", xlabel="bf16 folder, GB", ylabel=label)
        axes.set_xticks(gb, [f"{name}\n{size:.1f}" for name, size in zip(found, gb)])
        axes.minorticks_off()

    def seconds(axes: Any) -> None:
        panel(axes, "cpu_seconds", "CPU seconds", [*STEPS, *COPIES])
        axes.legend()

    def memory(axes: Any) -> None:
        panel(axes, "peak_gib", "peak resident memory, GiB", STEPS)
        axes.plot(gb, [size * 1e9 / 2**30 for size in gb], "--", color="grey", label="the folder itself")
        axes.legend()

    draw_panels(file, seconds, memory, size=(11, 4.5))


def main() -> None:
    """Measure all sizes and print the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="135m,1b,3b,8b")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--rest", type=float, default=10.0, help="seconds before each copy and conversion")
    parser.add_argument("--last", choices=STEPS, default=STEPS[-1], help="the step after which a size is done")
    options = parser.parse_args()
    found = {}
    print(
        "| model | step | seconds | speed over that of each copy | CPU seconds | peak memory, GiB | load |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    for size in options.sizes.split(","):

        def show(step: str, steps: dict[str, dict[str, float]], size: str = size) -> None:
            row, found[size] = steps[step], steps
            shares = [f"{steps[copy]['seconds'] / row['seconds']:.2f}" for copy in COPIES if step == "convert"]
            figures = f"{row['seconds']:.1f} | {'; '.join(shares)} | {row['cpu_seconds']:.1f} | {row['peak_gib']:.2f}"
            figures += f" | {row['load']:.0f}"
            about = f"{size} ({parameter_count(BASES[SIZES[size]]) / 1e9:.2f}B, {steps['folder']['gb']:.1f} GB)"
            print(f"| {about} | {step} | {figures} |", flush=True)

        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            measure_size(SIZES[size], Path(scratch), options.repeat, options.verify, options.last, options.rest, show)
    if options.plot:
        plot(found, options.plot)
    print(
        json.dumps(
            {size: {s: {k: round(v, 2) for k, v in r.items()} for s, r in steps.items()} for size, steps in found.items()}
        )
    )


if __name__ == "__main__":
    with plain_errors("benchmark"):
        main()
