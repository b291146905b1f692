"""Time and peak GPU memory of calibrating and upcycling a model of a given size, one layer in memory at a time.

    python benchmarks/upcycle_memory.py --size 8b --tokens 262144 [--sequential] [--scratch FOLDER]
    torchrun --nproc-per-node 4 benchmarks/upcycle_memory.py ...

Under torchrun the ranks share the work; memory is that of the rank that has most (of a part of a step: the first rank's). A
random bf16 model with the shapes of a released Llama (135m: SmolLM2) is made first; three times its size must be free on the
disk. What is in the scratch folder is not made again, and a step that was cut off goes on at the layer where it was. Prints a
row as soon as a step or a part of it is done, and, last, one JSON line.
"""

import contextlib
import json
import resource
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from convert import PATTERN, SIZES
from jsonargparse import auto_cli
from report import device_name, random_text

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.write_folders import write_model_folder
from megatron_hylo.io import gather, on_main, rank, world_size
from megatron_hylo.io.progress import show_progress
from megatron_hylo.platform.distributed import device, session
from megatron_hylo.upcycle.run import upcycle_folder

DTYPE = torch.bfloat16


class Rows:
    """Rows of the table: steps, and the loops in them, each with its time and its peak of memory."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.depth = 0
        say("| step | seconds | peak GPU memory, GiB | of it reserved | peak host memory so far, GiB |\n|---|---|---|---|---|")

    @contextlib.contextmanager
    def row(self, name: str, of_all_ranks: bool) -> Iterator[None]:
        """Measure what runs in the context."""
        cuda, start = torch.cuda.is_available(), time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        used = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        held = torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0
        memory = used, held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        used, held, host = (max(values) for values in zip(*(gather(memory) if of_all_ranks else [memory])))
        seconds = time.perf_counter() - start
        self.found[name] = {"seconds": round(seconds, 1), "gpu_gib": round(used, 2), "host_gib": round(host, 2)}
        say(f"| {name} | {seconds:.1f} | {used:.2f} | {held:.2f} | {host:.2f} |")

    def step(self, name: str, output: Path, run: Callable[[], Any]) -> None:
        """Run and measure a step whose output is not there yet; its parts' peaks are in its own row too."""
        if on_main(output.exists):
            say(f"| {name}: was there | | | | |")
            return
        with self.row(name, of_all_ranks=True):
            run()
        peaks = [row["gpu_gib"] for part, row in self.found.items() if part.startswith(name)]
        self.found[name]["gpu_gib"] = max(peaks)

    def track(self, step: str, items: Iterable, description: str) -> Iterator[Any]:
        """Show progress of a loop and, at its end, a row of it where it is no loop in a loop."""
        self.depth += 1
        try:
            outermost = self.depth == 1
            with self.row(f"{step}: {description}", of_all_ranks=False) if outermost else contextlib.nullcontext():
                yield from show_progress(items, description)
        finally:
            self.depth -= 1


def say(line: str) -> None:
    """Print a line on the first rank, at once."""
    if rank() == 0:
        print(line, flush=True)


def main(
    size: str = "8b",
    tokens: int = 262_144,
    sequence_length: int = 2048,
    sequential: bool = False,
    scratch: Path | None = None,
    layers: int | None = None,
) -> None:
    """Make, calibrate and upcycle a random model.

    Args:
        size: 135m, 1b, 3b or 8b.
        tokens: of calibration.
        sequence_length: tokens of a window.
        sequential: let each layer correct those before it.
        scratch: folder for the models, which stay in it; without, they are removed at the end.
        layers: of the model; by default as many as the released one has.
    """
    config = BASES[SIZES[size]]
    if layers is not None:
        config = config.replace(hybrid_layer_pattern="*-" * layers)
    shapes = tensor_names(config)
    pattern = "".join(islice(cycle(PATTERN), config.num_hidden_layers))

    def read(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=DTYPE)
        generator = torch.Generator(device()).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shapes[name], dtype=DTYPE, device=device())
        return values.normal_(std=0.02, generator=generator).cpu()

    def make_text(folder: Path) -> None:
        windows = {"train": (tokens // sequence_length + 1, sequence_length + 1), "heldout": (4, sequence_length + 1)}
        unfinished = folder.with_name("data.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        random_text(unfinished, config.vocab_size, windows)
        unfinished.rename(folder)

    with session():
        folder = scratch or Path(on_main(partial(tempfile.mkdtemp)))
        on_main(partial(folder.mkdir, parents=True, exist_ok=True))
        teacher, data, calibration, student = (folder / name for name in ("teacher", "data", "calibration", "student"))
        rows = Rows()
        try:
            rows.step("make the model", teacher, lambda: write_model_folder(
                teacher, config, DTYPE, read, "random", lambda: {}, track=partial(rows.track, "make the model"),
            ))  # fmt: skip
            rows.step("make the text", data, partial(on_main, partial(make_text, data)))
            rows.step("calibrate", calibration, lambda: calibrate(
                teacher, data, calibration, tokens, sequence_length, heldout=4,
                precision=DTYPE if torch.cuda.is_available() else torch.float32, track=partial(rows.track, "calibrate"),
            ))  # fmt: skip
            settings = UpcycleConfig(
                str(teacher), str(student), pattern=pattern, calibration=str(calibration), sequential=sequential
            )
            rows.step("upcycle", student, lambda: upcycle_folder(settings, partial(rows.track, "upcycle")))
        finally:
            if rank() == 0 and scratch is None:
                shutil.rmtree(folder)
        ranks = world_size()
    about = {"benchmark": "upcycle_memory", "device": device_name(), "ranks": ranks, "size": size, "tokens": tokens}
    say(json.dumps(about | {"layers": config.num_hidden_layers, "steps": rows.found}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
