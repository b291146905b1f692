"""The drills: what happens to jobs."""

import re
import signal
import time
from collections.abc import Callable

from tests.slurm.drills.cluster import kill, read_bytes
from tests.slurm.drills.lab import (
    EVAL_INTERVAL,
    MOMENT,
    OVERRIDES,
    ROOT,
    STEPS,
    Drill,
    Job,
    Lab,
)


def signal_batch(lab: Lab, job: Job, number: str = "USR1") -> None:
    """Slurm's signal to the batch script, as --signal=B:USR1 sends it."""
    lab.cluster.call("scancel", "--batch", f"--signal={number}", job.id)


def _preempt(lab: Lab) -> None:
    """Take all nodes by a job of a partition of higher priority."""
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    lab.cluster.wait_for_end(lab.cluster.call("sbatch", "--parsable", *words).strip(), 120)


def usr1_at_a_step(lab: Lab, job: Job) -> str:
    lab.wait_for_step(job, MOMENT)
    signal_batch(lab, job)
    return f"at step {job.step()}"


def usr1_in_startup(lab: Lab, job: Job) -> str:
    lab.wait_for_start(job)
    time.sleep(1)
    signal_batch(lab, job)
    lab.cluster.wait(lambda: job.events("requeued") or job.step() > 1, 300, "requeue")
    return f"{job.step()} steps done"


def usr1_twice(lab: Lab, job: Job) -> str:
    lab.wait_for_start(job)
    lab.pause(3)
    signal_batch(lab, job)
    lab.wait_for_start(job, 2)
    lab.wait_for_step(job, 2 * MOMENT)
    signal_batch(lab, job)
    return ""


def usr1_in_evaluation(lab: Lab, job: Job) -> str:
    """The evaluation after this step takes seconds."""
    lab.wait_for_step(job, EVAL_INTERVAL)
    time.sleep(0.5)
    signal_batch(lab, job)
    lab.cluster.wait(lambda: job.events("requeued"), 300, "requeue")
    return f"ended at step {job.step()}"


def time_limit(lab: Lab, job: Job) -> None:
    """Nothing is done: Slurm sends SIGUSR1 before the limit, each time until the run is finished.

    Slurm looks at limits every 30 seconds, so the run is longer than others.
    """


def requeue(lab: Lab, job: Job) -> str:
    lab.wait_for_step(job, MOMENT)
    lab.cluster.call("scontrol", "requeue", job.id)
    return f"at step {job.step()}"


def requeue_in_startup(lab: Lab, job: Job) -> str:
    lab.wait_for_start(job)
    lab.pause(3)
    lab.cluster.call("scontrol", "requeue", job.id)
    return ""


def higher_partition(lab: Lab, job: Job) -> str:
    """A job of a partition of higher priority takes all nodes."""
    lab.wait_for_step(job, MOMENT)
    _preempt(lab)
    return f"at step {job.step()}"


def cancelled_and_submitted_again(lab: Lab, job: Job) -> str:
    lab.wait_for_step(job, MOMENT)
    lab.cluster.call("scancel", job.id)
    lab.cluster.wait_for_end(job.id, 60)
    words = [f"--{key}={value}" for key, value in OVERRIDES.items()]
    job.id = lab.sbatch(
        ["--parsable", f"--nodes={job.nodes}", "--gpus-per-node=1", "--time=60", f"--output={job.run}.out",
         str(ROOT / "slurm" / "stage2_ctx8k.sh"), *words], {"OUTPUT": str(job.run)},
    )  # fmt: skip
    return ""


def step_killed(lab: Lab, job: Job) -> str:
    """The step of the second node dies, as by a machine's fault that Slurm does not see."""
    lab.wait_for_step(job, MOMENT)
    assert lab.cluster.kill_steps("drill2", batch=False), "no step on drill2"
    return ""


def node_killed(lab: Lab, job: Job) -> str:
    """The second node dies: slurmd, steps and all; it comes back once Slurm has noticed."""
    lab.wait_for_step(job, MOMENT)
    lab.cluster.kill_node("drill2")
    lab.cluster.wait(lambda: "down" in lab.cluster.call("sinfo", "-h", "-N", "-n", "drill2", "-o", "%T"), 120, "down node")
    lab.cluster.start_node("drill2")
    return ""


def batch_node_killed(lab: Lab, job: Job) -> str:
    """The node of the batch script dies."""
    lab.wait_for_step(job, MOMENT)
    node = lab.cluster.job(job.id)["BatchHost"]
    lab.cluster.kill_node(node)
    lab.cluster.wait(lambda: "down" in lab.cluster.call("sinfo", "-h", "-N", "-n", node, "-o", "%T"), 120, "down node")
    lab.cluster.start_node(node)
    return node


def rank_killed(lab: Lab, job: Job) -> str:
    lab.wait_for_step(job, MOMENT)
    lab.kill_rank(job)
    return ""


def rank_hangs(lab: Lab, job: Job) -> str:
    """A rank stands still; the others wait for it, and Slurm asks the job to stop."""
    lab.wait_for_step(job, MOMENT)
    lab.kill_rank(job, signal.SIGSTOP)
    time.sleep(2)
    signal_batch(lab, job)
    return ""


def rank_slow(lab: Lab, job: Job) -> str:
    """A rank stands still three quarters of the time; the log must name it."""
    lab.wait_for_step(job, 4)
    pid = lab.random.choice(lab.ranks(job))
    rank = re.search(rb"\0RANK=(\d+)", read_bytes(f"/proc/{pid}/environ"))
    said = f"rank {rank[1].decode() if rank else ''} on "
    while not any(said in line and "is slow in" in line for line in (job.run / "log.txt").read_text().splitlines()):
        assert job.step() < STEPS, f"the log does not call {said.strip()} slow"
        for number, seconds in ((signal.SIGSTOP, 0.3), (signal.SIGCONT, 0.1)):
            kill(pid, number)
            time.sleep(seconds)
    return said.strip()


def nothing(lab: Lab, job: Job) -> None:
    pass


def always_fails(lab: Lab, job: Job) -> None:
    """Each start is killed: the job must not go on for ever."""
    for start in (1, 2, 3):
        lab.wait_for_start(job, start)
        lab.wait_for(job, lambda: bool(lab.ranks(job)), "ranks")
        time.sleep(1)
        lab.kill_rank(job)


def saved_on_request(lab: Lab, job: Job) -> str:
    lab.wait_for_step(job, MOMENT)
    (job.run / "save_now").touch()
    lab.wait_for(job, lambda: not (job.run / "save_now").exists(), "checkpoint on request")
    lab.kill_rank(job)
    return ""


SLOW_EVALUATION: dict[str, object] = {"eval_windows": 600}
MANY = {"MAX_REQUEUES": "20"}
DRILLS = [
    Drill("one node, undisturbed", nothing, starts=1),
    Drill("one node, SIGUSR1 at a step", usr1_at_a_step),
    Drill("one node, SIGUSR1 in start-up", usr1_in_startup),
    Drill("one node, SIGUSR1 in an evaluation", usr1_in_evaluation, arguments=SLOW_EVALUATION),
    Drill("one node, save_now, then the rank is killed", saved_on_request, repeats=None),
    Drill("one node, SIGUSR1 in start-up and at a step", usr1_twice, starts=3),
    Drill("one node, time limit", time_limit, steps=6 * STEPS, limited=True, environment=MANY),
    Drill("one node, scontrol requeue", requeue),
    Drill("one node, scontrol requeue in start-up", requeue_in_startup),
    Drill("one node, preempted by a higher partition", higher_partition),
    Drill("one node, scancel and submitted again", cancelled_and_submitted_again),
    Drill("one node, its slurmd and steps die", batch_node_killed, repeats=None),
    Drill("one node, the rank is killed", rank_killed, repeats=None),
    Drill("one node, bad input is not tried again", nothing, arguments={"micro_batch_size": 3}, starts=1, state="FAILED",
          finished=False),
    Drill("one node, every start fails", always_fails, starts=3, state="FAILED", finished=False, repeats=None),
    Drill("two nodes, undisturbed", nothing, nodes=2, starts=1),
    Drill("two nodes, SIGUSR1 at a step", usr1_at_a_step, nodes=2),
    Drill("two nodes, SIGUSR1 in start-up", usr1_in_startup, nodes=2),
    Drill("two nodes, time limit", time_limit, nodes=2, steps=6 * STEPS, limited=True, environment=MANY),
    Drill("two nodes, scontrol requeue", requeue, nodes=2),
    Drill("two nodes, preempted by a higher partition", higher_partition, nodes=2),
    Drill("two nodes, the step on one dies", step_killed, nodes=2, repeats=None),
    Drill("two nodes, one node dies", node_killed, nodes=2, repeats=None),
    Drill("two nodes, a rank hangs, then SIGUSR1", rank_hangs, nodes=2, repeats=None, environment={"STOP_SECONDS": "15"}),
    Drill("two nodes, a rank is slow", rank_slow, nodes=2, starts=1),
]  # fmt: skip


def random_drills(count: int) -> list[Drill]:
    """Drills of the short kinds, each at a random moment between the job's start and its end."""

    def at_random(kind: str) -> Callable[[Lab, Job], str]:
        def disturb(lab: Lab, job: Job) -> str:
            lab.wait_for_start(job)
            seconds = lab.pause(18)
            if kind == "scontrol requeue":
                lab.cluster.call("scontrol", "requeue", job.id)
            elif kind == "SIGUSR1":
                signal_batch(lab, job)
            elif kind == "preempted":
                _preempt(lab)
            else:
                lab.wait_for(job, lambda: bool(lab.ranks(job)) or job.events("finished"), "ranks")
                if lab.ranks(job):
                    lab.kill_rank(job)
            return f"after {seconds:.1f} s, at step {job.step()}"

        return disturb

    kinds = [("SIGUSR1", 1), ("preempted", 2), ("scontrol requeue", 1), ("a rank is killed", 2), ("SIGUSR1", 2),
             ("scontrol requeue", 2), ("a rank is killed", 1)]  # fmt: skip
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    return [
        Drill(f"{'two nodes' if nodes == 2 else 'one node'}, {kind} at a random moment ({i + 1})", at_random(kind), nodes=nodes,
              starts=1, repeats=None if "killed" in kind else 0)
        for i, (kind, nodes) in enumerate(chosen)
    ]  # fmt: skip
