"""Helpers of all benchmarks: table and results file, charts, random text, time and memory, names of devices and models."""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console
from rich.table import Table

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import BASES, get_layout
from megatron_hylo.eval.plots import DASHES, LIGHT, rc


def device_name() -> str:
    """The GPU's, or the CPU's number of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def free_memory() -> None:
    """Models refer to themselves and wait for the garbage collector. Peak memory is counted anew from here on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(step: Callable[[], Any]) -> float:
    """Seconds of one call, until the GPU's work is done."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def architecture(name: str) -> ModelConfig:
    """Configuration of a named layout or dense base model; "LAYOUT:GGMM..." has these mixers in place of the layout's."""
    name, _, mixers = name.partition(":")
    config = BASES[name] if name in BASES else get_layout(name).config
    return config.replace(hybrid_layer_pattern="".join(f"{mixer}-" for mixer in mixers)) if mixers else config


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def report(
    results: Path, title: str, intro: list[str], columns: tuple[str, ...], rows: list[tuple[str, ...]], how: str
) -> None:
    """Show a table and write it to RESULTS.md.

    Args:
        results: path without suffix.
        title, intro: the file's heading, and paragraphs after it.
        columns, rows: cells.
        how: what else makes the numbers: device, commit and so on, after the command and the version of torch.
    """
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".md").write_text("\n".join([
        f"# {title}", "", *(line for paragraph in intro for line in (paragraph, "")),
        f"`{' '.join(sys.argv)}`, torch {torch.__version__}, {how}", "",
        markdown(columns, rows), "",
    ]))  # fmt: skip


def draw_panels(file: Path, *panels: Callable[[Axes], None], size: tuple[float, float]) -> None:
    """Draw charts side by side into a PNG file, in the style of all pictures of the project.

    Args:
        file: to write.
        panels: called with the axes of a chart each.
        size: width and height of the picture in inches.
    """
    with matplotlib.rc_context(rc(LIGHT)):
        figure = Figure(figsize=size, layout="constrained")
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
            panel(axes)
        figure.savefig(file, dpi=120)


def line(number: int) -> dict[str, Any]:
    """Style of a chart's line by its number, for `Axes.plot`: six colours, then the same ones with other dashes and markers."""
    cycle, colour = divmod(number, len(LIGHT.series))
    return {"color": LIGHT.series[colour], "linestyle": DASHES[cycle % len(DASHES)], "marker": "os^D"[cycle % 4]}


def random_text(folder: Path, vocabulary: int, documents: dict[str, tuple[int, int]]) -> None:
    """A dataset folder of random tokens.

    Args:
        folder: to make.
        vocabulary: of the tokens.
        documents: for "train" and "heldout", how many, and how many tokens each has.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, (count, length) in documents.items():
        builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.int32)
        for _ in range(count):
            builder.add_document(generator.integers(0, vocabulary, length).tolist(), [length])
        builder.finalize(str(folder / f"{split}.idx"))
    (folder / "data.json").write_text(json.dumps({"vocab_size": vocabulary}))
