"""`hylo sweep`: cells of settings run on this machine or as a Slurm array, and a report on them."""

import contextlib
import dataclasses
import json as json_module
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megatron_hylo.cli.boundary import EXIT_ERROR, EXIT_FAILURE, EXIT_STOPPED
from megatron_hylo.cli.console import console, print_json, results, track
from megatron_hylo.cli.types import PositiveInt

if TYPE_CHECKING:
    from megatron_hylo.plan.sweep import Cell, Stage, Sweep

COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red", "killed": "red"}
PDEATHSIG = 1  # prctl's number for the signal that a process gets when the one that started it is gone


def sweep(
    what: list[str],
    cell: int | None = None,
    slurm: bool = False,
    dry_run: bool = False,
    at_once: PositiveInt | None = None,
    samples: PositiveInt = 1000,
    json: bool = False,
) -> int:
    """Train and measure a grid of hybrids: `hylo sweep SPEC.yaml` runs it, `hylo sweep report SPEC.yaml` shows what came out.

    Cells have a process each, some side by side. The same command goes on where it was: finished cells stay, stopped ones
    resume from their newest checkpoint, failed ones are started again at most `retries` times. Exits 1 where cells failed,
    3 where it was stopped.

    Args:
        what: SPEC.yaml (docs/scaling.md), or report and SPEC.yaml.
        cell: run this one cell alone, by its number, in this process.
        slurm: write OUTPUT/slurm/sweep.sh, one task a cell, instead of running; submit it with sbatch.
        dry_run: check all cells and list them; run nothing.
        at_once: cells side by side, instead of the specification's.
        samples: of the bootstrap, of a report.
        json: print cells and states, or the report's fits, instead of tables.
    """
    from megatron_hylo.config import ConfigError
    from megatron_hylo.plan.sweep import read_sweep

    reporting = what[0] == "report"
    files = what[1:] if reporting else what
    if len(files) != 1:
        raise ConfigError(f"give one SPEC.yaml, or report and one SPEC.yaml, got {' '.join(what)}")
    found = read_sweep(Path(files[0]).expanduser())
    if reporting:
        from megatron_hylo.plan.sweep_report import write_report

        report = write_report(found, samples)
        print_json(report) if json else show_report(report)
        return 0
    if cell is not None:
        if not 0 <= cell < len(found.cells):
            raise ConfigError(f"cell {cell} is none of 0 to {len(found.cells) - 1}")
        return run_cell(found.cells[cell])
    if slurm:
        from megatron_hylo.plan.sweep_slurm import write_array

        script = write_array(found, at_once or found.at_once)
        console.print(f"wrote {script}; submit it: sbatch {script}")
        return 0
    if not dry_run:
        run_all(found, at_once or found.at_once)
    return show_cells(found, json, dry_run)


def run_cell(cell: "Cell") -> int:
    """Make a cell's student and train it in this process; returns the exit code.

    An earlier start of the cell that still runs, or saves because its sweep was killed, is waited for.
    """
    from filelock import FileLock, Timeout

    from megatron_hylo.cli.train import train

    with contextlib.suppress(OSError, AttributeError):  # when the sweep itself is killed its cells save and stop
        import ctypes

        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGUSR1)
    cell.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cell.folder / ".start.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        console.print(f"waiting for another start of cell {cell.number} to end", markup=False)
        held = lock.acquire()
    with held:
        make_student(cell)
        for stage in cell.stages:
            stage.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(stage.folder / ".stage.lock"):  # cells that begin alike share it
                if stage.train is not None and (code := train(stage.train)):
                    return code
                measure_stage(stage)
        return 0


def measure_stage(stage: "Stage") -> None:
    """Take the evaluations of a stage that are not there yet, at lengths within the model's window."""
    left = stage.unmeasured()
    if not left:
        return
    import gc

    import torch

    from megatron_hylo.cli.evaluation import measure
    from megatron_hylo.eval.results_page import write_report
    from megatron_hylo.plan.job import shape

    gc.collect()  # the training that came before
    torch.cuda.empty_cache()
    window = shape(str(stage.model)).max_position_embeddings
    for one in left:
        lengths = one.settings.lengths and [length for length in one.settings.lengths if length <= window]
        console.print(f"measure {stage.model} by {one.name}", markup=False, soft_wrap=True)
        found = measure(stage.model, dataclasses.replace(one.settings, lengths=lengths or one.settings.lengths))
        found.write(stage.results(one), also=write_report)


def make_student(cell: "Cell") -> None:
    """Make the model that a cell starts from; cells that share it wait for the first of them."""
    if cell.upcycle is None:
        return
    from filelock import FileLock

    output = Path(cell.upcycle.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{output}.lock"):
        if (output / "hylo.json").is_file():
            return
        from megatron_hylo.platform.distributed import session
        from megatron_hylo.upcycle.run import upcycle_folder

        with session():
            upcycle_folder(cell.upcycle, track=track)


def run_all(sweep: "Sweep", at_once: int) -> None:
    """Run the cells that are not finished, `at_once` side by side, each as `hylo sweep SPEC --cell N`.

    Raises:
        ConfigError: the specification asks for more GPUs than there are.
    """
    from megatron_hylo.config import ConfigError
    from megatron_hylo.platform.distributed import gpu_names

    names = gpu_names()
    if sweep.gpus is not None and sweep.gpus > len(names):
        raise ConfigError(
            f"{sweep.file}: gpus is {sweep.gpus}, but {len(names)} are visible here, and a cell without one would train on the "
            f"CPU; leave gpus out for all there are"
        )
    names = names[: sweep.gpus]
    left = [cell for cell in sweep.cells if cell.state()[0] != "finished"]
    stopping, children, slots = threading.Event(), set[subprocess.Popen](), queue.SimpleQueue[int]()
    for slot in range(at_once):
        slots.put(slot)

    def one(cell: "Cell") -> None:
        """Run a cell in a free slot; with several GPUs it sees one of them alone."""
        slot = slots.get()
        try:
            start(cell, {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if names else {})
        finally:
            slots.put(slot)

    def start(cell: "Cell", environment: dict[str, str]) -> None:
        """Start a cell's process, again up to `retries` times where it fails; each attempt is a line of attempts.jsonl."""
        for _ in range(sweep.retries + 1):
            if stopping.is_set():
                return
            cell.folder.mkdir(parents=True, exist_ok=True)
            started = time.time()
            command = [sys.executable, "-m", "megatron_hylo.cli", "sweep", str(sweep.file), "--cell", str(cell.number)]
            with open(cell.folder / "log.txt", "a") as log:
                print(f"$ {shlex.join(command)}", file=log, flush=True)
                child = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | environment
                )
                children.add(child)
                if stopping.is_set():  # `stop` may have looked before this child was there
                    child.send_signal(signal.SIGUSR1)
                code = child.wait()
                children.discard(child)
            if stopping.is_set() and code == -signal.SIGUSR1:  # it was still starting and had nothing to save
                code = EXIT_STOPPED
            message = f"killed by signal {-code}" if code < 0 else ""
            if code > 0 and code != EXIT_STOPPED:
                message = _last_line(cell.folder / "log.txt")
            with open(cell.folder / "attempts.jsonl", "a") as file:
                line = {"time": started, "seconds": round(time.time() - started, 1), "code": code, "message": message}
                print(json_module.dumps(line), file=file)
            if code in (0, EXIT_STOPPED):
                return
            console.print(f"cell {cell.number} failed with exit status {code}: {message}", style="red", markup=False)
            if code == EXIT_ERROR:  # bad input stays bad
                return

    def stop(signum: int, frame: Any) -> None:
        """Start nothing more, and signal the cells that run."""
        stopping.set()
        for child in list(children):  # training finishes its step and saves
            with contextlib.suppress(OSError):
                os.kill(child.pid, signal.SIGUSR1)

    kept = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with ThreadPoolExecutor(at_once) as pool:
            for cell in track([pool.submit(one, cell) for cell in left], f"{len(left)} of {len(sweep.cells)} cells"):
                cell.result()
                if stopping.is_set():
                    break
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    if stopping.is_set():
        done = sum(cell.state()[0] == "finished" for cell in sweep.cells)
        console.print(f"stopped; {done} of {len(sweep.cells)} cells are finished, and the same command goes on", markup=False)


def _last_line(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if "rror" in line]
    return (errors or lines or [""])[-1][:500]


def show_cells(sweep: "Sweep", as_json: bool, dry_run: bool) -> int:
    """Print the cells with their states; returns the exit code."""
    from megatron_hylo.plan.sweep_page import varied_names
    from megatron_hylo.plan.sweep_rows import row_of

    rows = [row_of(cell) for cell in sweep.cells]
    if as_json:
        print_json({"output": str(sweep.output), "cells": rows})
    else:
        varied = varied_names(sweep)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("cell", *varied, "state", "held-out loss", "minutes of training"):
            table.add_column(name, overflow="fold")
        for cell, row in zip(sweep.cells, rows):
            loss = row.get("heldout_kl") or row.get("heldout_cross_entropy")
            figures = ("" if loss is None else f"{loss:.4f}", f"{row['seconds'] / 60:.1f}" if row["seconds"] else "")
            state = f"[{COLOURS[row['state']]}]{row['state']}" if row["state"] in COLOURS else row["state"]
            table.add_row(str(cell.number), *(str(cell.varied.get(name, "")) for name in varied), state, *figures)
        results.print(table)
        for cell, row in zip(sweep.cells, rows):
            if row["state"] in ("failed", "killed"):
                results.print(
                    f"cell {cell.number}, {row['attempts']} starts: {row['message']} ({cell.folder}/log.txt)", markup=False
                )
    if dry_run:
        return 0
    states = Counter(row["state"] for row in rows)
    if states["finished"] == len(rows):
        return 0
    return EXIT_FAILURE if states["failed"] or states["killed"] else EXIT_STOPPED


def show_report(report: dict[str, Any]) -> None:
    """Print the fits of a report."""
    for fit in report["fits"]:
        results.print(fit["sentence"], markup=False, highlight=False)
    results.print(f"{report['finished']} of {report['cells']} cells; wrote {', '.join(report['files'])}", markup=False)
