"""A sweep as a Slurm array: one task a cell, with the stopping, requeueing and retrying of slurm/common.sh."""

import shlex
import shutil
import sys
from pathlib import Path

import megatron_hylo
from megatron_hylo.config import ConfigError
from megatron_hylo.plan.sweep import Sweep, recipe_of

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
stage=sweep
slurm_dir={slurm}
export HYLO_PYTHON="${{HYLO_PYTHON:-{python}}}"
export HYLO_ROOT="${{HYLO_ROOT:-{output}}}"
export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"
number="${{SLURM_ARRAY_TASK_ID:?submit this file with sbatch}}"
case "$number" in
{cases}
    *)
        echo "error: cell $number is none of {numbers}" >&2
        exit 2
        ;;
esac
"$HYLO_PYTHON" -m megatron_hylo.cli sweep {spec} --cell "$number" --prepare
# shellcheck source=/dev/null
source "$slurm_dir/common.sh" "$@"
"""


def write_array(sweep: Sweep, at_once: int) -> Path:
    """Write OUTPUT/slurm/sweep.sh and a recipe in each cell's folder.

    Args:
        sweep: the cells; those that are finished have no task.
        at_once: tasks that run at a time.

    Returns:
        The script.

    Raises:
        ConfigError: cells of several stages, or evaluations, which a task of the array does not run.
    """
    if any(stage.name or stage.measurements for cell in sweep.cells for stage in cell.stages):
        raise ConfigError(
            f"{sweep.file} has stages or evaluate, which a Slurm array of single runs does not do; run it without --slurm in "
            f"one job, with gpus: N for the GPUs of its node"
        )
    output, root = sweep.output.absolute(), Path(megatron_hylo.__path__[0]).parent
    left = [cell for cell in sweep.cells if cell.state()[0] != "finished"]
    cases = []
    for cell in left:
        cell.folder.mkdir(parents=True, exist_ok=True)
        recipe = cell.folder / "recipe.yaml"
        c = cell.last.train
        assert c is not None, "a cell without stages has a run"
        recipe.write_text(recipe_of(c))
        values = {"RECIPE": recipe, "OUTPUT": cell.folder / "run", "DATA": Path(c.data).absolute()}
        values |= {"MODEL": Path(c.model).absolute()} if c.model else {}
        values |= {"TEACHER": Path(c.teacher).absolute()} if c.teacher else {}
        words = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())
        cases.append(f"    {cell.number}) {words} ;; # {' '.join(f'{k}={v}' for k, v in cell.varied.items())}")
    folder = output / "slurm"
    common = Path(megatron_hylo.__path__[0]) / "slurm"
    shutil.copytree(
        common, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage*", "submit_chain.sh", "Dockerfile")
    )
    script = folder / "sweep.sh"
    numbers = ",".join(str(cell.number) for cell in left) or "0"
    script.write_text(HEAD.format(
        name=sweep.file.stem, spec=shlex.quote(str(sweep.file.absolute())), script=script, numbers=numbers, at_once=at_once,
        output=output,
        slurm=shlex.quote(str(folder)), python=sys.executable, root=shlex.quote(str(root)),
        cases="\n".join(cases),
    ))  # fmt: skip
    return script
