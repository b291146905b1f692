"""Processes of tests, forked from a server that has imported torch and Megatron-Core once, where a fresh one takes 6 s a rank.

`run_ranks` stands for `torchrun MODULE ARGUMENTS`, `Program` for `python -m MODULE ARGUMENTS`: the module runs as `__main__`
with its own environment, its output goes to a file, and its exit status is the process's own.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import ClassVar

import psutil

ROOT = Path(__file__).parents[1]
# NVML's check of CUDA leaves nothing behind that forked processes could trip over
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": str(ROOT)}
PRELOADED = ["megatron_hylo.train.loop", "megatron_hylo.calibrate.gather", "megatron_hylo.cli.main", "tests.parity.faults"]
PRELOADED += ["tests.frozen"]  # last
_context = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start it unless it runs, with the environment that libraries read when they are imported."""
    from multiprocessing import forkserver

    kept = dict(os.environ)
    os.environ.update(QUIET)
    try:
        _context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _main(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules.*", category=RuntimeWarning)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


class Program:
    """`python -m MODULE ARGUMENTS`, leader of a session of its own, with the calls of subprocess.Popen that tests need.

    This process would wait at its end for programs that still run, so it kills those that a failed fixture has left.
    """

    started: ClassVar[list["Program"]] = []

    def __init__(self, module: str, arguments: list, log: Path, environment: dict[str, str] | None = None) -> None:
        _start_server()
        self.log = log
        full = {**os.environ, **QUIET, **(environment or {})}
        self.process = _context.Process(target=_main, args=(module, [str(a) for a in arguments], full, str(log)))
        self.process.start()
        self.pid, self.sentinel = self.process.pid, self.process.sentinel
        self.started.append(self)

    @property
    def returncode(self) -> int | None:
        """Exit status, negative where a signal ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The same, as subprocess.Popen has it."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and all that it has started in its session, which it may not have begun yet."""
        if self.poll() is None:
            for send in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    send(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Exit status once it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs longer than that many seconds; it is killed then, since this process waits for
                all that it has started before it ends.
        """
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.process.name), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """(standard output and error, None) once it has ended."""
        self.wait(timeout)
        return self.log.read_text(), None


def end_programs(kept: list[Program]) -> None:
    """Kill the programs that run, but those of the list, and forget those that have ended."""
    for program in Program.started:
        if program not in kept:
            program.kill()
            program.process.join()
    Program.started[:] = [program for program in Program.started if program.poll() is None]


atexit.register(end_programs, [])


def kill_family(process: subprocess.Popen) -> None:
    """Kill a process, if it runs, and all that it has started, in whichever sessions: torchrun gives each worker its own."""
    if process.poll() is None:
        leader = psutil.Process(process.pid)
        for member in (leader, *leader.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


@contextlib.contextmanager
def running(command: Sequence[object], **options) -> Iterator[subprocess.Popen]:
    """Popen as a context that does not wait without end where a test fails in it: the process and its family are killed."""
    with subprocess.Popen(list(map(str, command)), text=True, **options) as process:
        try:
            yield process
        finally:
            kill_family(process)


class Ranks:
    """The ranks of one module, under torchrun's variables, each with a log in `scratch`."""

    def __init__(
        self, module: str, arguments: list, ranks: int, scratch: Path, environment: dict[str, str] | None = None
    ) -> None:
        import torch.distributed as dist

        self.module, self.logs = module, [scratch / f"{module}.{number}.log" for number in range(ranks)]
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds it
        common = {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", **(environment or {}),
        }  # fmt: skip
        self.programs: list[Program] = []
        for number, log in enumerate(self.logs):
            log.write_text("")
            mine = common | {"RANK": str(number), "LOCAL_RANK": str(number)}
            self.programs.append(Program(module, arguments, log, mine))

    def statuses(self) -> list[int | None]:
        """Exit status of every rank, None where it runs."""
        return [program.poll() for program in self.programs]

    def said(self) -> str:
        """The end of what each rank printed."""
        return "\n".join(
            f"rank {rank}, status {status}:\n{log.read_text()[-6000:]}"
            for rank, (status, log) in enumerate(zip(self.statuses(), self.logs))
        )

    def kill(self) -> None:
        """End those that run."""
        for program in self.programs:
            program.kill()
            program.process.join()


def run_ranks(
    module: str, arguments: list, ranks: int, scratch: Path, environment: dict[str, str] | None = None, timeout: float = 300
) -> str:
    """Run a module on several ranks and wait; returns what rank 0, then each of the others, printed.

    Raises:
        RuntimeError: a rank failed (the others are killed), or they took longer than `timeout` seconds.
    """
    started = Ranks(module, arguments, ranks, scratch, environment)
    try:
        deadline = time.monotonic() + timeout
        while None in started.statuses() and not any(started.statuses()) and time.monotonic() < deadline:
            running = [program.sentinel for program in started.programs if program.poll() is None]
            if running:  # all may have ended since the line before, and nothing to wait for means the whole time
                wait(running, max(0.0, deadline - time.monotonic()))
        if any(status != 0 for status in started.statuses()):
            time.sleep(0.5)  # for the others' own errors
            raise RuntimeError(f"{ranks} ranks of {module} failed, or took more than {timeout} s:\n{started.said()}")
    finally:
        started.kill()
    return "".join(log.read_text() for log in started.logs)
