"""The worth of an initialiser: a hybrid's quality before any training, and after the same training from each start.

    python benchmarks/upcycle_quality.py                                    # all of it: about 25 minutes on one H100
    python benchmarks/upcycle_quality.py --tokens []                        # before training only; also on a CPU
    python benchmarks/upcycle_quality.py --training [sequential] --seeds [1]  # a part, on another GPU, with the same --work

Each measurement is a file in WORK/cells: what is there is not measured again, and the table is made of all that is there.
Prints the table and, last, one JSON line; writes RESULTS.md and RESULTS.png. The teacher is SmolLM2-135M-Instruct
dequantised from 4 bits, the text the Debian documentation packages, whole documents held out.
"""

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from report import device_name, draw_panels, free_memory, line, report

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.cli.quickstart_budgets import BUDGETS, stage_config
from megatron_hylo.config.layouts import get_layout, kv_percent
from megatron_hylo.config.train import CheckpointSettings, LoggingSettings
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.data.artefacts import fetch_documents, fetch_teacher
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.eval.plots import short_number
from megatron_hylo.io import has_manifest, write_json
from megatron_hylo.models.description import read_description
from megatron_hylo.platform.distributed import session
from megatron_hylo.train.loop import train
from megatron_hylo.upcycle.run import upcycle_folder

ALL_MLA = dict(pattern="+" * 30, overrides=dict(kv_lora_rank=78, qk_pos_emb_head_dim=48))
GDN, MAMBA2 = "smollm2-135m-8mla22gdn", "smollm2-135m-8mla22m2"
EVEN, EVEN_MAMBA2 = (dict(pattern=get_layout(name).config.mixers) for name in (GDN, MAMBA2))
STARTS: dict[str, dict[str, Any]] = {  # name: settings of its UpcycleConfig
    "paper": dict(layout=GDN, init="paper"),
    "one-shot": dict(layout=f"{GDN}-teacher"),
    "one-shot, evenly spread layers": EVEN,
    "sequential, mixers alone": EVEN | dict(sequential=True, mlps=False),
    "sequential": dict(layout=f"{GDN}-teacher", sequential=True),
    "sequential, evenly spread layers": EVEN | dict(sequential=True),
    "sequential, paper's shapes": dict(layout=GDN, sequential=True),
    "Mamba2 paper": dict(layout=MAMBA2, init="paper"),
    "Mamba2 one-shot": dict(layout=f"{MAMBA2}-teacher"),
    "Mamba2 one-shot, evenly spread layers": EVEN_MAMBA2,
    "Mamba2 sequential, evenly spread layers": EVEN_MAMBA2 | dict(sequential=True),
    "all MLA one-shot": ALL_MLA,
    "all MLA sequential": ALL_MLA | dict(sequential=True),
}


@dataclass(frozen=True)
class Training:
    """How a start is trained; all else is the quickstart's."""

    start: str
    align_loss: str = "mse"
    windows: int = 8  # of a step
    mixer_lr: float = 1e-3  # of stage 2
    lr: float = 2e-4
    adam_beta2: float = 0.95  # of stage 2


TWO_WINDOWS = dict(windows=2, mixer_lr=7e-4, lr=1.5e-4, adam_beta2=0.98)
TRAINING = {
    "paper": Training("paper", "ild"),
    "one-shot, evenly spread layers": Training("one-shot, evenly spread layers"),
    "one-shot": Training("one-shot"),
    "one-shot, 4 windows a step": Training("one-shot", windows=4),
    "one-shot, 2 windows a step": Training("one-shot", **TWO_WINDOWS),
    "sequential": Training("sequential"),
    "sequential, 2 windows a step": Training("sequential", **TWO_WINDOWS),
    "Mamba2 one-shot": Training("Mamba2 one-shot"),
}
STAGE_1 = 0.1  # of the tokens


def main(
    work: Path = Path("runs/upcycle_quality"),
    starts: list[str] = list(STARTS),  # noqa: B006  jsonargparse shows it
    training: list[str] = ["paper", "one-shot", "one-shot, 2 windows a step"],  # noqa: B006
    tokens: list[int] = [1_000_000, 3_000_000, 10_000_000],  # noqa: B006
    seeds: list[int] = [0, 1],  # noqa: B006
    calibration_tokens: int = 262_144,
    eval_windows: int = 128,
    results: Path = Path("benchmarks/results/upcycle_quality"),
    commit: str | None = None,
) -> None:
    """Measure what is missing in WORK, then show all of it.

    Args:
        work: folder for models, runs and measurements.
        starts: which initialisations to measure before training.
        training: which of them to train.
        tokens: of both stages together, a separate run each; empty for none.
        seeds: of the order of the text.
        calibration_tokens: text that the calibrated starts see.
        eval_windows: held-out windows of 2,048 tokens.
        results: path without suffix of the .md and .png to write.
        commit: of the code; asked of git by default.
    """
    teacher, data, calibration = work / "teacher", work / "data", work / "calibration"
    with session():
        if not has_manifest(teacher):
            convert_hf_to_megatron(fetch_teacher(), teacher)
        if not has_manifest(data):
            preprocess(str(fetch_documents()), str(data), str(teacher))
        if not has_manifest(calibration):
            calibrate(teacher, data, calibration, calibration_tokens, 2048, heldout=eval_windows)
    for name in starts:
        measure_start(name, work, teacher, calibration)
    for count in tokens:
        for seed in seeds:
            for name in training:
                measure_training(name, count, seed, work, teacher, data, calibration, eval_windows)
    show(list(cells(work)), results, commit)


def measure_start(name: str, work: Path, teacher: Path, calibration: Path) -> None:
    """One start without training, in fp32; leaves the model for training in WORK/starts."""
    file, model = cell_file(work, name, 0, 0), work / "starts" / slug(name)
    if file.is_file() and has_manifest(model):
        return
    start = time.perf_counter()
    with session():
        settings = UpcycleConfig(str(teacher), str(model), calibration=str(calibration), overwrite=True, **STARTS[name])
        report = upcycle_folder(settings)
        kv = kv_percent(report.config)
    quality, reference = report.quality.to_dict(), report.teacher_quality
    values = dict(seconds=time.perf_counter() - start, kv_percent=kv, teacher_perplexity=reference.perplexity)
    save_cell(file, dict(name=name, train_tokens=0, seed=0, precision="fp32") | quality | values)
    free_memory()


def measure_training(
    name: str, tokens: int, seed: int, work: Path, teacher: Path, data: Path, calibration: Path, eval_windows: int
) -> None:
    """One start, aligned and distilled on `tokens` tokens in all."""
    file = cell_file(work, name, tokens, seed)
    if file.is_file():
        return
    how = TRAINING[name]
    measure_start(how.start, work, teacher, calibration)
    model, run = work / "starts" / slug(how.start), work / "runs" / file.stem
    budget = replace(
        BUDGETS["cuda" if torch.cuda.is_available() else "cpu", "calibrated"], align_loss=how.align_loss, mixer_lr=how.mixer_lr,
        lr=how.lr, eval_windows=eval_windows, align_batch_size=how.windows, distil_batch_size=how.windows,
        micro_batch_size=how.windows,
    )  # fmt: skip
    first = int(STAGE_1 * tokens)
    started = time.perf_counter()
    for stage, source, count in (("align", model, first), ("distil", run / "align" / "model", tokens - first)):
        settings = stage_config(stage, budget, source, teacher, data, run, count)
        if stage == "distil":
            settings.optimizer.adam_beta2 = how.adam_beta2
        quality = train(
            replace(
                settings,
                seed=1000 + seed,
                checkpoint=CheckpointSettings(save_interval=10**9),
                logging=LoggingSettings(log_interval=20, tensorboard=False),
            )
        )
        free_memory()
    values = dict(seconds=time.perf_counter() - started, kv_percent=kv_percent(read_description(model)[0]))
    save_cell(file, dict(name=name, train_tokens=tokens, seed=seed, precision=budget.precision) | quality.to_dict() | values)
    shutil.rmtree(run)


def slug(name: str) -> str:
    """A name as part of a path."""
    return name.replace(" ", "_").replace(",", "").replace("'", "")


def cell_file(work: Path, name: str, tokens: int, seed: int) -> Path:
    """Path of a measurement."""
    return work / "cells" / f"{slug(name)}-{tokens}-{seed}.json"


def save_cell(file: Path, values: dict[str, Any]) -> None:
    """Write a measurement with the device it was made on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, values | {"device": device_name()})


def cells(work: Path) -> Iterator[dict[str, Any]]:
    """All measurements there are."""
    for file in sorted((work / "cells").glob("*.json")):
        yield json.loads(file.read_text())


def show(found: list[dict[str, Any]], results: Path, commit: str | None) -> None:
    """Table, plot, results file, JSON line."""
    order = [*STARTS, *TRAINING]
    found.sort(key=lambda c: (c["train_tokens"], order.index(c["name"]), c["seed"]))
    teacher = next((c["teacher_perplexity"] for c in found if "teacher_perplexity" in c), None)
    paper = {(c["train_tokens"], c["seed"]): c["kl"] for c in found if c["name"] == "paper"}
    columns = ("start", "tokens", "seed", "perplexity", "KL", "KL / paper's", "top-1 %", "KV %", "seconds")
    rows = []
    for c in found:
        base = paper.get((c["train_tokens"], c["seed"]))
        ratio = f"{c['kl'] / base:.3f}" if base else ""
        numbers = (f"{c['perplexity']:,.2f}", f"{c['kl']:.4f}", ratio, f"{100 * c['agreement']:.1f}", f"{c['kv_percent']:.1f}")
        rows.append((c["name"], f"{c['train_tokens']:,}", str(c["seed"]), *numbers, f"{c['seconds']:.0f}"))
    intro = [
        "SmolLM2-135M-Instruct dequantised from 4 bits"
        + (f" (held-out perplexity {teacher:.2f} in fp32)" if teacher else "")
        + f", {found[0]['tokens']:,} held-out tokens of\nwhole documents in windows of 2,048. KL(teacher || hybrid) in nats a "
        "token. Tokens: of both stages, 10% stage 1.",
        "![KL by training tokens](upcycle_quality.png)",
    ]
    devices = ", ".join(sorted({c["device"] for c in found}))
    how = f"Python {platform.python_version()}, {devices}, commit {commit or git_commit()}"
    report(results, "Quality of a hybrid by its start and training", intro, columns, rows, how)
    plot(found, results.with_suffix(".png"))
    print(json.dumps({"benchmark": "upcycle_quality", "teacher_perplexity": teacher, "cells": found}))


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Draw KL against training tokens: a line through the mean of each start, its seeds as points."""

    def curves(axes: Axes) -> None:
        for name in TRAINING:
            points = [(c["train_tokens"], c["kl"]) for c in found if c["name"] == name]
            if not points:
                continue
            counts = sorted({count for count, _ in points})
            means = [sum(kl for c, kl in points if c == count) / sum(c == count for c, _ in points) for count in counts]
            style = line(len(axes.lines) // 2)
            axes.plot(counts, means, label=name, **(style | {"marker": None}))
            axes.plot(*zip(*points), linestyle="none", marker="o", markersize=4, color=style["color"])
        axes.set(xlabel="training tokens", ylabel="KL to the teacher, nats a token", yscale="log")
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axes.minorticks_off()
        axes.set_xscale("symlog", linthresh=1e6)
        counts = sorted({c["train_tokens"] for c in found})
        axes.set_xticks(counts, [short_number(count) for count in counts])
        axes.set(xlim=(-1e5, None), ylim=(min(c["kl"] for c in found) / 1.2, None))
        if axes.lines:
            axes.legend(fontsize=8, loc="upper right")

    draw_panels(file, curves, size=(7, 4.4))


def git_commit() -> str:
    """Short hash of the checkout, "unknown" outside one."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
