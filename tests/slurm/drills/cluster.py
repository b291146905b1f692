"""A Slurm cluster of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd."""

import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

NODES = ("drill1", "drill2")
PORT = 17000  # slurmctld's; the nodes have the next ones
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
CONFIGURATION = """
ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
# a requeued job waits until its credential has expired: 2 minutes by default
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
SlurmdTimeout=10
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=drill[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=drill[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=urgent Nodes=drill[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Reason why no Slurm can be started here; None where it can. On Debian and Ubuntu root may have it installed."""
    if platform.system() != "Linux":
        return f"Slurm's daemons need Linux, this is {platform.system()}"
    absent = [name for name in DAEMONS if _which(name) is None]
    if absent and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing slurm-wlm and munge ({', '.join(absent)} not found)", flush=True)
        quiet: dict[str, Any] = dict(capture_output=True, text=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        subprocess.run(["apt-get", "update"], **quiet)
        command = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
        if (done := subprocess.run(command, **quiet)).returncode:
            return f"apt-get install slurm-wlm munge failed: {done.stderr.strip().splitlines()[-1:]}"
        absent = [name for name in DAEMONS if _which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found; as root: apt-get install slurm-wlm munge"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            return f"port {PORT} is taken, by another slurm-test perhaps"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """Started on entry, ended with every job on exit.

    Args:
        folder: for configuration, state and logs; its parents must be enterable by the user of the daemons.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "HYLO"))}
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def __enter__(self) -> "Cluster":
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        user = self._program("id", "-un").strip()
        values = dict(host=platform.node(), user=user, port=PORT, folder=self.folder, first=PORT + 1, last=PORT + 2)
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (self.folder / "gres.conf").write_text("NodeName=drill[1-2] Name=gpu File=/dev/null\n")
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        try:
            self._program("munged", "--force", f"--socket={munge / 'socket'}", *files)
            self._program("slurmctld", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait(
                lambda: set(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == {*NODES}, 120, "idle nodes"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if (self.folder / "slurmctld.pid").is_file():
            subprocess.run(["scancel", f"--user={os.geteuid()}"], env=self.environment, timeout=30)
        for pid in (*(f"slurmd-{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"):
            self._end(self.folder / pid)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._program("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd and every step on it, as a machine that loses its power does."""
        self._end(self.folder / f"slurmd-{node}.pid", signal.SIGKILL)
        self.kill_steps(node)

    def kill_steps(self, node: str, batch: bool = True) -> int:
        """Kill slurmstepd and the processes below it on a node; returns the number of steps.

        Args:
            node: name.
            batch: also the step that runs the batch script.
        """
        steps = [
            pid for pid, command in processes().items()
            if command.startswith("slurmstepd: [") and self._node_of(pid) == node and (batch or ".batch]" not in command)
        ]  # fmt: skip
        for pid in steps:
            for process in (pid, *descendants(pid)):
                kill(process)
        return len(steps)

    def _node_of(self, pid: int) -> str | None:
        """Node of a slurmstepd, by the environment of the tasks below it."""
        for process in descendants(pid):
            found = re.search(rb"SLURMD_NODENAME=(\w+)", read_bytes(f"/proc/{process}/environ"))
            if found:
                return found[1].decode()
        return None

    def call(self, *words: str) -> str:
        """Output of a Slurm command."""
        return self._program(*words)

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job (of the first task, of an array)."""
        words = self.call("scontrol", "show", "job", job, "-o").splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_end(self, job: str, seconds: float) -> str:
        """Wait until a job has ended for good; its state, or STUCK after that many seconds."""
        deadline, ended = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            records = [
                dict(word.split("=", 1) for word in line.split() if "=" in word)
                for line in self.call("scontrol", "show", "job", job, "-o").splitlines()
            ]
            states = [record["JobState"] for record in records]
            ended = ended + 1 if all(state in ENDED for state in states) else 0
            if ended == 3:  # a preempted job passes through a state of the end on its way into the queue
                return "+".join(dict.fromkeys(states))
            time.sleep(0.5)
        return f"STUCK ({'+'.join(states)}, {records[0].get('Reason')})"

    def wait(self, condition: Any, seconds: float, what: str) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {seconds:.0f} s; see {self.folder}/log")
            time.sleep(0.1)

    def _program(self, *words: str) -> str:
        if words[0] in ("munged", "slurmctld", "slurmd"):  # daemons keep the files that they are given open
            with open(self.folder / "log" / "daemons.txt", "a+") as output:
                done = subprocess.run(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
                output.seek(0)
                said = output.read()
        else:
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
            said = done.stderr
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}: {said.strip()[-500:]}")
        return done.stdout or ""

    def _end(self, pid_file: Path, number: int = signal.SIGTERM) -> None:
        if not pid_file.is_file():
            return
        pid = int(pid_file.read_text())
        kill(pid, number)
        deadline = time.monotonic() + 15
        while Path(f"/proc/{pid}").exists() and b"Z" not in read_bytes(f"/proc/{pid}/stat").split()[2:3]:
            if time.monotonic() > deadline:
                kill(pid)
                break
            time.sleep(0.1)
        pid_file.unlink(missing_ok=True)


def read_bytes(file: str) -> bytes:
    """Content of a file of /proc, empty where the process has gone."""
    try:
        return Path(file).read_bytes()
    except OSError:
        return b""


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process that may have gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def processes() -> dict[int, str]:
    """Command line of every process."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return {pid: read_bytes(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace") for pid in pids}


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    below: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, read_bytes(str(children)).split()):
            below += [child, *descendants(child)]
    return below
