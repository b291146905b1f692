"""One drill: a job under Slurm, something that happens to it, and a comparison of what is left with an undisturbed run."""

import math
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_hylo.eval.runs import read_lines, seconds_of
from megatron_hylo.io import verify_manifest
from tests.slurm.drills.cluster import ENDED, Cluster, kill, processes

ROOT = Path(__file__).parents[3]
STEPS, SAVE_INTERVAL, EVAL_INTERVAL, STEP_TOKENS = 48, 16, 20, 128
MOMENT = SAVE_INTERVAL + 2  # step at which most things happen: behind a checkpoint, before an evaluation
OVERRIDES = {  # steps of some 0.07 s: starting takes most of a drill
    "sequence_length": 64, "global_batch_size": 2, "micro_batch_size": 1, "train_tokens": STEPS * STEP_TOKENS,
    "precision": "fp32", "optimizer.lr": 1e-3,
    "logging.log_interval": 1, "logging.tensorboard": "false", "eval_windows": 4, "recall.share": 0,
    "eval_interval": EVAL_INTERVAL, "checkpoint.save_interval": SAVE_INTERVAL, "parallel.distributed_timeout_minutes": 5,
}  # fmt: skip
PATIENCE = 1500.0  # seconds for a job, its requeues included


@dataclass
class Job:
    """A submitted job and the run that it trains."""

    id: str
    run: Path
    nodes: int

    def step(self) -> int:
        """Newest step that the run has recorded."""
        return max((r["step"] for r in read_lines(self.run / "metrics.jsonl") if "loss" in r), default=0)

    def events(self, name: str) -> int:
        """Events of a kind in the run's jobs.jsonl."""
        return sum(e["event"] == name for e in read_lines(self.run / "jobs.jsonl"))


@dataclass
class Outcome:
    """How a drill ended."""

    name: str
    problems: list[str]
    seconds: float
    starts: int
    requeues: int
    retries: int
    repeated: int  # steps that were computed twice
    note: str = ""


@dataclass
class Drill:
    """One thing that happens to a job.

    Args:
        name: for the table.
        disturb: given the laboratory and the running job; returns a note for the table.
        nodes: of the job.
        options: of sbatch.
        environment: of the job.
        arguments: of `hylo train`.
        repeats: steps that may be computed twice; None: any number.
        starts: least number of starts that the run must have had, so that the drill has hit it.
        state: in which Slurm must have left the job.
        finished: whether the run must be finished, with an undisturbed run's losses.
        limited: whether the job's time limit falls into the middle of a run.
        steps: of the run.
    """

    name: str
    disturb: "Callable[[Lab, Job], str | None]"
    nodes: int = 1
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)
    repeats: int | None = 0
    starts: int = 2
    state: str = "COMPLETED"
    finished: bool = True
    limited: bool = False
    steps: int = STEPS


class Lab:
    """A cluster, a HYLO_ROOT and the losses of undisturbed runs in it.

    Args:
        cluster: started.
        root: made by `tests.slurm.tiny_root`.
        seed: of the random moments.
    """

    def __init__(self, cluster: Cluster, root: Path, seed: int) -> None:
        self.cluster, self.root, self.random = cluster, root, random.Random(seed)
        self.references: dict[tuple[int, int], dict[int, float]] = {}  # by nodes and steps
        self.submitted = 0
        (root / "runs").mkdir(exist_ok=True)

    def submit(self, drill: Drill, *options: str, stage: str = "stage2_ctx8k") -> Job:
        """Submit a stage as a user does."""
        self.submitted += 1
        run = self.root / "runs" / f"{self.submitted:02d}-{re.sub(r'[^a-z0-9]+', '-', drill.name.lower())[:40]}"
        words = [
            f"--{key}={value}"
            for key, value in (OVERRIDES | {"train_tokens": drill.steps * STEP_TOKENS} | drill.arguments).items()
        ]
        shared = ["--parsable", f"--nodes={drill.nodes}", "--gpus-per-node=1", "--time=60", f"--output={run}.out"]
        if drill.limited:
            middle = self.middle_of(drill)
            minutes = math.ceil((middle + 15) / 60)
            shared += [f"--time={minutes}", f"--signal=B:USR1@{60 * minutes - round(middle)}"]
        job = self.sbatch(
            [*shared, *drill.options, *options, str(ROOT / "slurm" / f"{stage}.sh"), *words],
            {"OUTPUT": str(run)} | drill.environment,
        )
        return Job(job, run, drill.nodes)

    def submit_chain(self, *stages: str, **environment: str) -> list[str]:
        """Run submit_chain.sh; returns the jobs' numbers."""
        said = self.call(["bash", str(ROOT / "slurm" / "submit_chain.sh"), *stages], environment)
        return [line.split()[-1] for line in said.splitlines()]

    def sbatch(self, words: list[str], environment: dict[str, str]) -> str:
        """Run sbatch; returns the job's number."""
        return self.call(["sbatch", *words], environment).strip().split(";")[0]

    def call(self, words: list[str], environment: dict[str, str]) -> str:
        """Run a command as a user of the cluster; returns what it prints."""
        mine = {
            "HYLO_ROOT": str(self.root), "HYLO_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "RETRY_SECONDS": "1",
            "XDG_CACHE_HOME": str(self.root / "cache"),
        } | environment  # fmt: skip
        self.cluster.environment |= mine
        try:
            return self.cluster.call(*words)
        finally:
            for name in mine:
                self.cluster.environment.pop(name)

    def run(self, drill: Drill) -> Outcome:
        """Take a drill to its end and judge it."""
        begun = time.monotonic()
        try:
            job = self.submit(drill)
            note = drill.disturb(self, job) or ""
            state = self.cluster.wait_for_end(job.id, PATIENCE)
            if drill.starts == 1 and drill.finished and "undisturbed" in drill.name:
                self.keep_reference(job, state, drill.steps)
            problems = self.judge(drill, job, state)
        except (TimeoutError, RuntimeError, OSError, AssertionError) as error:
            job, note, problems = Job("", self.root, 1), "", [str(error)]
        log = read_lines(job.run / "jobs.jsonl")
        events = Counter(e["event"] for e in log)
        outcome = Outcome(
            drill.name, problems, time.monotonic() - begun, events["started"], events["requeued"], events["retried"],
            self.repeated(job.run), note,
        )  # fmt: skip
        if problems and job.id:
            self.cluster.call("scancel", "--quiet", job.id)
        if not problems and drill.finished:
            shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
        return outcome

    def judge(self, drill: Drill, job: Job, state: str) -> list[str]:
        """Find what is wrong with a job that has ended; nothing where all is well."""
        problems = [] if state == drill.state else [f"Slurm says {state}, not {drill.state}"]
        if drill.finished:
            problems += self.compare(job.run, self.reference(drill.nodes, drill.steps))
        if (starts := job.events("started")) < drill.starts:
            problems.append(f"only {starts} starts: the drill missed the run")
        repeated = self.repeated(job.run)
        if drill.repeats is not None and repeated > drill.repeats:
            problems.append(f"{repeated} reported steps were computed again, {drill.repeats} are allowed")
        if (job.run / "stop_requested").exists():
            problems.append("stop_requested was left behind")
        return problems

    def reference(self, nodes: int, steps: int = STEPS) -> dict[int, float]:
        """Losses of an undisturbed run of so many steps on that many nodes, the first such run's."""
        if (nodes, steps) not in self.references:
            self.undisturbed(Drill(f"undisturbed, {nodes} nodes", lambda lab, job: None, nodes=nodes, steps=steps))
        return self.references[nodes, steps]

    def undisturbed(self, drill: Drill) -> Job:
        """Run what a drill runs, to its end, and keep its losses."""
        job = self.submit(drill)
        self.keep_reference(job, self.cluster.wait_for_end(job.id, PATIENCE), drill.steps)
        return job

    def keep_reference(self, job: Job, state: str, steps: int) -> None:
        """Take an undisturbed run for the reference of its number of nodes and steps."""
        losses = read_losses(job.run)
        if state != "COMPLETED" or sorted(losses) != list(range(1, steps + 1)):
            raise RuntimeError(f"the undisturbed run ended {state} with {len(losses)} steps: {job.run}.out")
        self.references.setdefault((job.nodes, steps), losses)

    def middle_of(self, drill: Drill) -> float:
        """Seconds from the start of a drill's run to its middle, measured by one that is not disturbed, at today's load."""
        job = self.undisturbed(replace(drill, name=f"undisturbed, {drill.name}", limited=False))
        times = [r["time"] for r in read_lines(job.run / "metrics.jsonl") if "loss" in r]
        return (times[0] + times[-1]) / 2 - seconds_of(read_lines(job.run / "jobs.jsonl")[0]["time"])

    def compare(self, run: Path, reference: dict[int, float]) -> list[str]:
        """Differences of a finished run from an undisturbed one: steps, losses and evaluations bit for bit."""
        if not (run / "model" / "manifest.json").is_file():
            return ["there is no model"]
        verify_manifest(run / "model")
        losses = read_losses(run)
        if absent := sorted(reference.keys() - losses.keys()):
            return [f"{len(absent)} steps have no record, first {absent[0]}"]
        different = [step for step, loss in reference.items() if losses[step] != loss]
        measured = [r["step"] for r in read_lines(run / "metrics.jsonl") if "heldout_perplexity" in r]
        problems = [f"{len(different)} losses differ, first at step {different[0]}"] if different else []
        return problems + (
            []
            if measured == [*range(EVAL_INTERVAL, len(reference), EVAL_INTERVAL), len(reference)]
            else [f"evaluated at steps {measured}"]
        )

    def repeated(self, run: Path) -> int:
        """Steps that log.txt has more than once."""
        file = run / "log.txt"
        steps = re.findall(r" step (\d+)/\d+  loss", file.read_text()) if file.is_file() else []
        return sum(count - 1 for count in Counter(steps).values())

    def wait_for_step(self, job: Job, step: int) -> None:
        """Wait until a run has recorded a step; fails once the job has ended without it."""
        self.wait_for(job, lambda: job.step() >= step, f"step {step}")

    def wait_for_start(self, job: Job, count: int = 1) -> None:
        """Wait until a job's script has started the run for the so-manieth time."""
        self.wait_for(job, lambda: job.events("started") >= count, "start")

    def wait_for(self, job: Job, condition: Callable[[], bool], what: str) -> None:
        """Wait for something of a job."""

        def holds() -> bool:
            if condition():
                return True
            if self.cluster.job(job.id)["JobState"] in ENDED:
                time.sleep(2)  # on its way into the queue
                if (state := self.cluster.job(job.id)["JobState"]) in ENDED and not condition():
                    raise RuntimeError(f"the job ended {state} before {what}; see {job.run}.out")
            return False

        self.cluster.wait(holds, 900, f"{what} of {job.run.name}")

    def ranks(self, job: Job) -> list[int]:
        """Processes that train a job's run, in no order."""
        found = []
        for pid, command in processes().items():
            if (
                "-m megatron_hylo.cli train" in command
                and str(job.run) in command
                and "megatron_hylo.train.launch" not in command
            ):
                found.append(pid)
        return found

    def kill_rank(self, job: Job, number: int = signal.SIGKILL) -> None:
        """Signal one rank of a job."""
        kill(self.random.choice(self.ranks(job)), number)

    def pause(self, most: float, least: float = 0.0) -> float:
        """Wait for a random time; returns the seconds."""
        seconds = self.random.uniform(least, most)
        time.sleep(seconds)
        return seconds


def read_losses(run: Path) -> dict[int, float]:
    """Training loss of each recorded step."""
    return {r["step"]: r["loss"] for r in read_lines(run / "metrics.jsonl") if "loss" in r}
