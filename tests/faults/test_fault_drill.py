"""A few of the drills of tools/fault_drill.py; all kinds, many times, is that script's work.

Its runs start under torchrun; here the ranks are forked, with the variables and the end of all when one fails as there.
"""

import importlib.util
import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from jsonargparse import auto_cli

from tests.forked import Ranks

TOOL = Path(__file__).parents[2] / "tools" / "fault_drill.py"
GRACE = 30  # seconds from SIGTERM to SIGKILL, as torchrun's


class Launcher:
    """Ranks with the calls of a torchrun process that the drills need."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.pid, self.returncode = ranks, ranks.programs[0].pid, None
        self.terminated: float | None = None

    def poll(self) -> int | None:
        """Exit status, 1 if a rank failed, once all have ended; None before."""
        statuses = self.ranks.statuses()
        if any(statuses) and None in statuses:
            if self.terminated is None:
                self.terminated = time.monotonic()
                for program in self.ranks.programs:
                    program.send_signal(signal.SIGTERM)
            elif time.monotonic() > self.terminated + GRACE:
                self.ranks.kill()
        elif None not in statuses:
            self.returncode = int(any(statuses))
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Return the output of the ranks, once they have ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.ranks.kill()
                raise subprocess.TimeoutExpired(self.ranks.module, timeout)
            time.sleep(0.01)
        return "".join(log.read_text() for log in self.ranks.logs), None


@pytest.fixture
def fault_drill(monkeypatch):
    """The tool as a module whose runs fork their ranks."""
    spec = importlib.util.spec_from_file_location("fault_drill", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Run(module.Run):
        def start(self, full_disk: bool = False) -> None:
            arguments = ["train", "--config", self.recipe, "--output", self.folder]
            program = "megatron_hylo.cli"
            if full_disk:
                program, arguments = "tests.faults.little_disk", [module.LARGEST_FILE, *arguments]
            self.process = Launcher(Ranks(program, arguments, self.ranks, self.recipe.parent))

        def kill(self) -> None:
            if self.process is not None:
                self.process.ranks.kill()

        def rank_processes(self) -> list[psutil.Process]:
            return [psutil.Process(program.pid) for program in self.process.ranks.programs if program.poll() is None]

    monkeypatch.setattr(module, "Run", Run)
    return module


@pytest.mark.multirank
def test_nothing_is_lost_by_a_preemption_a_flipped_bit_or_a_full_disk(fault_drill, one_rank, capsys):
    faults = ["SIGUSR1 to all ranks", "flip a bit of a shard", "fill the disk"]
    with pytest.raises(SystemExit) as ended:
        auto_cli(fault_drill.main, args=["--drills", "3", "--faults", json.dumps(faults)])
    output = capsys.readouterr().out
    assert ended.value.code == 0, output[-3000:]
    counted = json.loads(output.splitlines()[-1])
    assert counted["failures"] == [] and counted["by_fault"] == dict.fromkeys(faults, 1)


def test_a_line_that_is_being_written_is_not_read_yet(fault_drill, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25, "slowest/pas')
    assert fault_drill.Run(tmp_path, tmp_path / "recipe.yaml", 1).losses() == {1: 2.5}
