"""Drills of several jobs, of a job of two groups, and of a real model."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_hylo.config.recipes import recipe
from megatron_hylo.eval.runs import read_lines, seconds_of
from megatron_hylo.plan.sweep import read_sweep
from tests.slurm.drills.drills import nothing, signal_batch
from tests.slurm.drills.lab import MOMENT, OVERRIDES, PATIENCE, ROOT, STEP_TOKENS, STEPS, Drill, Job, Lab, Outcome, read_losses


def several_jobs(lab: Lab, names: list[str]) -> Iterator[Outcome]:
    """Take drills of `SEVERAL`, of several jobs or runs at a time."""
    for name in names:
        drill = SEVERAL[name]
        begun, jobs, problems = time.monotonic(), [], []
        try:
            for found in drill(lab):  # jobs first, then problems
                (jobs if isinstance(found, Job) else problems).append(found)
        except (TimeoutError, RuntimeError, OSError) as error:
            problems.append(str(error))
            for job in jobs:
                lab.cluster.call("scancel", "--quiet", job.id)
        starts, requeues, retries = (
            sum(job.events(event) for job in jobs) for event in ("started", "requeued", "retried")
        )  # fmt: skip
        repeated = sum(lab.repeated(job.run) for job in jobs)
        yield Outcome(name, problems, time.monotonic() - begun, starts, requeues, retries, repeated)


def _remote(lab: Lab) -> Iterator[Job | str]:
    """The heterogeneous job, student and teacher on a node each, stopped once."""
    run = lab.root / "runs" / "remote"
    words = [f"--{key}={value}" for key, value in OVERRIDES.items()]
    group = ["--nodes=1", "--gpus-per-node=1", "--time=60", f"--output={run}.out"]
    job = Job(
        lab.sbatch(
            ["--parsable", *group, ":", *group, str(ROOT / "slurm" / "remote_teacher.sh"), *words],
            {"OUTPUT": str(run), "TEACHER_OPTIONS": "--timeout_minutes 5", "HYLO_REPOSITORY": str(ROOT)},
        ),
        run,
        1,
    )
    yield job
    lab.wait_for_step(job, MOMENT)
    signal_batch(lab, job)
    if not (state := lab.cluster.wait_for_end(job.id, PATIENCE)).startswith("COMPLETED"):
        yield f"Slurm says {state}"
    losses, reference = read_losses(run), lab.reference(1)
    if losses.keys() != reference.keys():
        yield f"{len(losses)} steps"
    elif (worst := max(abs(losses[step] - reference[step]) for step in reference)) > 1e-4:
        yield f"losses differ by {worst}"  # the teacher's hidden states are handed on in another precision
    if job.events("requeued") != 1:
        yield f"{job.events('requeued')} requeues, not one"


def _chain(lab: Lab) -> Iterator[Job | str]:
    """Two stages, the first stopped once."""
    runs = {1: lab.root / "runs" / "chain1", 2: lab.root / "runs" / "chain2"}
    stages = ("stage1_ild", "stage2_ctx8k")
    ids = lab.submit_chain(
        *stages, OUTPUT_1=str(runs[1]), OUTPUT_2=str(runs[2]), SBATCH_GPUS_PER_NODE="1", SBATCH_TIMELIMIT="60",
        SBATCH_OUTPUT=f"{lab.root}/runs/chain-%j.out",
        **{f"RECIPE_{number}": str(_own_recipe(lab, stage)) for number, stage in enumerate(stages, 1)},
    )  # fmt: skip
    jobs = [Job(id, runs[number], 1) for number, id in enumerate(ids, 1)]
    yield from jobs
    lab.wait_for_step(jobs[0], MOMENT)
    signal_batch(lab, jobs[0])
    for job in jobs:
        if (state := lab.cluster.wait_for_end(job.id, PATIENCE)) != "COMPLETED":
            yield f"Slurm says {state} of {job.run.name}"
        if sorted(read_losses(job.run)) != list(range(1, STEPS + 1)):
            yield f"{job.run.name} has {len(read_losses(job.run))} steps"
    if json.loads((runs[2] / "config.json").read_text())["model"] != str(runs[1] / "model"):
        yield "the second stage did not begin with the model of the first"


def _array(lab: Lab) -> Iterator[Job | str]:
    """Two tasks, one stopped once."""
    job = lab.submit(Drill("array", nothing), "--array=0-1", f"--output={lab.root}/runs/array-%a.out")
    tasks = [Job(f"{job.id}_{task}", job.run.with_name(f"{job.run.name}_{task}"), 1) for task in (0, 1)]
    yield from tasks
    lab.wait_for_step(tasks[1], MOMENT)
    signal_batch(lab, tasks[1])
    if (state := lab.cluster.wait_for_end(job.id, PATIENCE)) != "COMPLETED":
        yield f"Slurm says {state}"
    for task in tasks:
        yield from lab.compare(task.run, lab.reference(1))
    if (starts := [task.events("started") for task in tasks]) != [1, 2]:
        yield f"starts {starts}, not one and two"


def _sweep(lab: Lab) -> Iterator[Job | str]:
    """Two cells of two stages, the first of which they share; one is stopped in its second stage, then both are measured."""
    file, train = lab.root / "sweep.yaml", yaml.safe_load(_own_recipe(lab, "stage2_ctx8k").read_text())
    paths = {"data": str(lab.root / "data" / "mix"), "model": str(lab.root / "stage1_ild" / "model")}
    values = {
        "output": str(lab.root / "runs" / "sweep"), "teacher": str(lab.root / "models" / "llama3.1-8b"), "train": train | paths,
        "stages": {"short": {"train_tokens": 2 * STEP_TOKENS}, "long": {}},
        "evaluate": {"text": {"suites": ["ppl"], "lengths": [64], "limit": 2, "sequence_length": 64}},
        "grid": {"stages.long.checkpoint.keep": [2, 3]},  # which changes no number
    }  # fmt: skip
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    lab.call([sys.executable, "-m", "megatron_hylo.cli", "sweep", str(file), "--slurm", "--at_once", "2"], {})
    cells = read_sweep(file).cells
    id = lab.sbatch(["--parsable", "--time=60", f"{values['output']}/slurm/sweep.sh"], {})
    yield from (Job(f"{id}_{cell.number}", cell.folder, 1) for cell in cells)
    second = Job(f"{id}_1", cells[1].last.run, 1)
    lab.wait_for_step(second, MOMENT)
    signal_batch(lab, second)
    if (state := lab.cluster.wait_for_end(id, PATIENCE)) != "COMPLETED":
        yield f"Slurm says {state}"
    if (states := [cell.state() for cell in cells]) != [("finished", "")] * 2:
        yield f"cells are {states}"
    one, other = (read_losses(cell.last.run) for cell in cells)
    if sorted(one) != list(range(1, STEPS + 1)) or one != other:
        yield f"{len(one)} and {len(other)} steps, whose losses must be the same"
    if (starts := [sum(e["event"] == "started" for e in read_lines(cell.folder / "jobs.jsonl")) for cell in cells]) != [1, 2]:
        yield f"starts {starts}, not one and two"


def first_steps(lab: Lab, quickstart: Path) -> Iterator[Outcome]:
    """Seconds from sbatch to the first step of the quickstart's 135M model, and from a stop to the first step behind it.

    Args:
        lab: the laboratory.
        quickstart: folder of `hylo quickstart`: teacher/, hybrid/, data/.
    """
    recipe_file = lab.root / "smollm2.yaml"
    recipe_file.write_text(recipe("smollm2-135m-8mla22gdn-teacher", "stage2_ctx8k"))
    small = {
        "sequence_length": 256, "global_batch_size": 1, "micro_batch_size": 1, "train_tokens": 12 * 256, "precision": "fp32",
        "logging.log_interval": 1, "logging.tensorboard": "false", "eval_windows": 2, "recall.share": 0, "eval_data": "[]",
        "checkpoint.save_interval": 6, "teacher_window.mode": "none",
    }  # fmt: skip
    paths = {name: str(quickstart / folder) for name, folder in (("MODEL", "hybrid"), ("TEACHER", "teacher"), ("DATA", "data"))}
    for name in ("135M, cold cache", "135M, warm cache, SIGUSR1 at a step"):
        begun, submitted, run = time.monotonic(), time.time(), lab.root / "runs" / re.sub(r"\W+", "-", name)
        words = ["--parsable", "--gpus-per-node=1", "--time=60", f"--output={run}.out", str(ROOT / "slurm" / "stage2_ctx8k.sh")]
        words += [f"--{key}={value}" for key, value in small.items()]
        job = Job(lab.sbatch(words, {"OUTPUT": str(run), "RECIPE": str(recipe_file)} | paths), run, 1)
        lab.wait_for_step(job, 1)
        note = f"first step {_first_record(job) - submitted:.0f} s after sbatch"
        if "SIGUSR1" in name:
            lab.wait_for_step(job, 4)
            stopped = time.time()
            signal_batch(lab, job)
            _wait_for_step_of_second_start(lab, job)
            note += f", first new step {_first_record(job) - stopped:.0f} s after the signal"
        state = lab.cluster.wait_for_end(job.id, PATIENCE)
        note += f", load {os.getloadavg()[1]:.0f} on {os.cpu_count()} cores"
        problems = [] if state == "COMPLETED" else [f"Slurm says {state}"]
        yield Outcome(
            name, problems, time.monotonic() - begun, job.events("started"), job.events("requeued"), 0, lab.repeated(run), note
        )


def _first_record(job: Job) -> float:
    """When the newest start recorded its first step, in seconds since 1970."""
    started = seconds_of([e for e in read_lines(job.run / "jobs.jsonl") if e["event"] == "started"][-1]["time"])
    return min(r["time"] for r in read_lines(job.run / "metrics.jsonl") if "loss" in r and r["time"] > started)


def _wait_for_step_of_second_start(lab: Lab, job: Job) -> None:
    lab.wait_for_start(job, 2)
    reached = job.step()
    lab.wait_for_step(job, reached + 1)


SEVERAL = {
    "chain of two stages, the first stopped once": _chain,
    "array of two tasks, one stopped once": _array,
    "a sweep of chains, one stopped in its second stage": _sweep,
    "teacher and student, one heterogeneous job, stopped once": _remote,
}


def _own_recipe(lab: Lab, stage: str):
    """The stage's recipe with the drills' overrides in it: submit_chain.sh hands no arguments on."""
    recipe = yaml.safe_load((ROOT / "megatron_hylo" / "recipes" / f"{stage}_llama3.2-1b.yaml").read_text())
    for key, value in OVERRIDES.items():
        *groups, name = key.split(".")
        place = recipe
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = {"false": False}.get(str(value), value)
    file = lab.root / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file
