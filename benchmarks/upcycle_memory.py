"""Time and peak GPU memory of calibrating and upcycling a model of a given size, one layer in memory at a time.

    python benchmarks/upcycle_memory.py --size 8b --tokens 262144 [--sequential] [--scratch FOLDER]
    torchrun --nproc-per-node 4 benchmarks/upcycle_memory.py ...

Under torchrun the ranks share the work; memory is that of the rank that has most. A random bf16 model with the shapes of a
released Llama (135m: SmolLM2) is made on the spot; three times its size must be free on the disk. Prints a table and, last, one
JSON line.
"""

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from convert import PATTERN, SIZES, write_source
from jsonargparse import auto_cli
from report import device_name, random_text

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.io import gather, on_main, rank, world_size
from megatron_hylo.io.progress import show_progress
from megatron_hylo.platform.distributed import session
from megatron_hylo.upcycle.run import upcycle_folder


def main(
    size: str = "8b", tokens: int = 262_144, sequence_length: int = 2048, sequential: bool = False, scratch: Path | None = None
) -> None:
    """Convert, calibrate and upcycle a random model.

    Args:
        size: 135m, 1b, 3b or 8b.
        tokens: of calibration.
        sequence_length: tokens of a window.
        sequential: let each layer correct those before it.
        scratch: folder for the models.
    """
    config, rows = BASES[SIZES[size]], []
    source_name = SIZES[size]

    def step(name: str, run: Callable[[], object]) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        gpu, host = (max(values) for values in zip(*gather((gpu, host))))
        rows.append((name, time.perf_counter() - start, gpu, host))
        say(f"| {name} | {rows[-1][1]:.1f} | {gpu:.2f} | {host:.2f} |")

    def say(line: str) -> None:
        if rank() == 0:
            print(line, flush=True)

    def make(folder: Path) -> None:
        windows = sequence_length + 1
        sizes = {"train": (tokens // sequence_length + 1, windows), "heldout": (4, windows)}
        random_text(folder / "data", config.vocab_size, sizes)
        write_source(folder / "source", source_name)

    with session():
        ranks, folder = world_size(), Path(on_main(partial(tempfile.mkdtemp, dir=scratch)))
        try:
            say("| step | seconds | peak GPU memory, GiB | peak host memory so far, GiB |\n|---|---|---|---|")
            step("make the model", partial(on_main, partial(make, folder)))
            step("convert", lambda: convert_hf_to_megatron(folder / "source", folder / "teacher", verify=False))
            on_main(partial(shutil.rmtree, folder / "source"))
            step("calibrate", lambda: calibrate(
                folder / "teacher", folder / "data", folder / "calibration", tokens, sequence_length, heldout=4,
                precision=torch.bfloat16 if torch.cuda.is_available() else torch.float32, track=show_progress,
            ))  # fmt: skip
            settings = UpcycleConfig(
                f"{folder}/teacher", f"{folder}/student", pattern="".join(islice(cycle(PATTERN), config.num_hidden_layers)),
                calibration=f"{folder}/calibration", sequential=sequential,
            )  # fmt: skip
            step("upcycle, calibrated", lambda: upcycle_folder(settings, show_progress))
        finally:
            if rank() == 0:
                shutil.rmtree(folder)
    names = ("seconds", "gpu_gib", "host_gib")
    found = {name: dict(zip(names, (round(value, 2) for value in values))) for name, *values in rows}
    about = {"benchmark": "upcycle_memory", "device": device_name(), "ranks": ranks, "size": size, "tokens": tokens}
    say(json.dumps(about | {"steps": found}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
