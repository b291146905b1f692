"""A sweep as a Slurm array: one task a cell, with the stopping, requeueing and retrying of slurm/common.sh."""

import shlex
import shutil
import sys
from pathlib import Path

import megatron_hylo
from megatron_hylo.plan.sweep import Cell, Sweep

SCRIPTS = ("common.sh", "node.sh", "nodes.sh", "site.sh", "supervise.sh")  # of slurm/, what common.sh needs for a cell
HEAD = """#!/usr/bin/env bash
# Sweep {name}: one task a cell. Made by `hylo sweep {spec} --slurm`; submit it: sbatch {script}
# Options of sbatch on the command line win over those below; variables are those of docs/cluster.md.
#SBATCH --job-name=hylo-sweep-{name}
#SBATCH --array={numbers}%{at_once}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}/slurm/%A_%a.out
set -euo pipefail
cd {here} # where the specification's relative paths begin
slurm_dir={slurm}
export HYLO_PYTHON="${{HYLO_PYTHON:-{python}}}"
export HYLO_ROOT="${{HYLO_ROOT:-{output}}}"
export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"
cell_specification={spec}
cell_number="${{SLURM_ARRAY_TASK_ID:?submit this file with sbatch}}"
case "$cell_number" in
{cases}
    *)
        echo "error: cell $cell_number is none of {numbers}" >&2
        exit 2
        ;;
esac
# shellcheck source=/dev/null
source "$slurm_dir/common.sh" "$@"
"""


def write_array(sweep: Sweep, at_once: int) -> Path:
    """Write OUTPUT/slurm/sweep.sh, whose tasks each take a cell through its student, stages and evaluations.

    Args:
        sweep: the cells; those that are finished have no task.
        at_once: tasks that run at a time.

    Returns:
        The script.
    """
    output, root = sweep.output.absolute(), Path(megatron_hylo.__path__[0]).parent
    left = [cell for cell in sweep.cells if cell.state()[0] != "finished"]
    cases = [f"    {cell.number}) {_places(cell)} ;; # {' '.join(f'{k}={v}' for k, v in cell.varied.items())}" for cell in left]
    folder = output / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        shutil.copy(Path(megatron_hylo.__path__[0]) / "slurm" / name, folder)
    script = folder / "sweep.sh"
    numbers = ",".join(str(cell.number) for cell in left) or "0"
    script.write_text(HEAD.format(
        name=sweep.file.stem, spec=shlex.quote(str(sweep.file.absolute())), script=script, numbers=numbers, at_once=at_once,
        output=output, here=shlex.quote(str(Path.cwd())),
        slurm=shlex.quote(str(folder)), python=sys.executable, root=shlex.quote(str(root)),
        cases="\n".join(cases),
    ))  # fmt: skip
    return script


def _places(cell: Cell) -> str:
    """Assignments of a cell's folder, runs and results, for slurm/common.sh; runs and results in the order of its stages."""
    runs = [stage.run for stage in cell.stages if stage.train is not None]
    results = [file for stage in cell.stages for file in stage.files]
    lists = {"cell_runs": runs, "cell_results": results}
    words = [f"{name}=({' '.join(shlex.quote(str(path)) for path in paths)})" for name, paths in lists.items()]
    return " ".join([f"OUTPUT={shlex.quote(str(cell.folder))}", *words])
